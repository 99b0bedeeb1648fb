"""Packed weights that sit where a parameter sat, so that no module is replaced and no model is patched.

A transformers module keeps its own forward. Its parameter becomes a `PackedTensor`: a tensor without storage that has
the parameter's shape and dtype and answers the few functions through which models use weights (`F.linear`,
`F.embedding`, Conv1D's `addmm`, `x @ W` of stacked experts, `x @ W.T`) straight from the packed form. Any other operation on it is
refused by name, so that no full matrix is ever materialised behind the user's back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from haversack.parts.weights.base import WeightOption


@dataclass(frozen=True)
class PackedMatrix:
    """One site: its option, its shape, and where its stored tensors lie right now.

    `tensors` is called at each use: resident and mapped sites return the same tensors every time, streamed sites return
    what the window holds while their layer runs.
    """

    site_id: str
    option: WeightOption
    out_features: int
    in_features: int
    tensors: Callable[[], Mapping[str, torch.Tensor]]

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """`x W^T`: `(..., in_features)` -> `(..., out_features)`."""
        return self.option.linear(x, self.tensors(), self.out_features)

    def rows(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the matrix by index: `(...,)` -> `(..., in_features)`."""
        tensors = self.tensors()
        if self.option.is_neutral:
            return F.embedding(index, tensors["weight"]).to(dtype)
        flat = self.option.rows(index.reshape(-1), tensors, self.in_features)
        return flat.to(dtype).reshape(*index.shape, self.in_features)


@dataclass(frozen=True)
class RowBlock:
    """A packed matrix and the rows of the parameter that it provides: `rows` is a slice with a step for interleaved rows."""

    matrix: PackedMatrix
    rows: slice


class PackedTensor(torch.Tensor):
    """A parameter `(out, in)`, or `(in, out)` if `transposed`, that lives only in packed form.

    `blocks` cover every row exactly once, in any order.
    """

    blocks: tuple[RowBlock, ...]
    transposed: bool

    @staticmethod
    def __new__(
        cls,
        blocks: Sequence[RowBlock],
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
        transposed: bool = False,
    ) -> PackedTensor:
        out_features = sum(block.matrix.out_features for block in blocks)
        in_features = blocks[0].matrix.in_features
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=False)
        self.blocks = tuple(blocks)
        self.transposed = transposed
        return self

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x W^T + bias`, each block writing its own rows of the result."""
        if len(self.blocks) == 1:
            y = self.blocks[0].matrix.linear(x)
        else:
            y = x.new_empty(*x.shape[:-1], sum(block.matrix.out_features for block in self.blocks))
            for block in self.blocks:
                y[..., block.rows] = block.matrix.linear(x)
        if bias is None:
            return y
        return y + bias if y.requires_grad else y.add_(bias)  # autograd forbids changing a custom function's view

    def embedding(self, index: torch.Tensor) -> torch.Tensor:
        """Rows by index; embeddings have one block."""
        (block,) = self.blocks
        return block.matrix.rows(index, self.dtype)

    def __repr__(self) -> str:  # type: ignore[override]  # the default would read the values
        sites = ", ".join(block.matrix.site_id for block in self.blocks)
        return f"PackedTensor({tuple(self.shape)}, {self.dtype}, {sites})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(
            f"{func} was asked of a packed weight ({args[0] if args else ''}); packed weights answer linear, embedding, "
            "addmm and matmul only, since anything else would unpack the whole matrix."
        )


class PackedStack(torch.Tensor):
    """A stacked parameter `(experts, ...)` whose experts are packed one by one; indexing gives one expert's tensor."""

    experts: tuple[PackedTensor, ...]

    @staticmethod
    def __new__(cls, experts: Sequence[PackedTensor]) -> PackedStack:
        first = experts[0]
        shape = (len(experts), *first.shape)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=first.dtype, device=first.device)
        self.experts = tuple(experts)
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedStack({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            return args[0].experts[int(args[1])]
        if func is torch.Tensor.detach:  # dispatching it would import torch.distributed.tensor, which takes .9 s
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} was asked of packed experts; index one expert at a time.")


def packed_parameters(model: torch.nn.Module) -> list[PackedTensor]:
    """Every packed parameter once, experts of a stack one by one."""
    found: dict[int, PackedTensor] = {}
    for parameter in model.parameters():
        for tensor in parameter.experts if isinstance(parameter, PackedStack) else (parameter,):
            if isinstance(tensor, PackedTensor):
                found[id(tensor)] = tensor
    return list(found.values())


def packed_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """The stored tensors of all packed parameters."""
    return [t for p in packed_parameters(model) for block in p.blocks for t in block.matrix.tensors().values()]


def _linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    assert isinstance(weight, PackedTensor) and not weight.transposed
    return weight.linear(x, bias)


def _embedding(
    index: torch.Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    if max_norm is not None:
        raise NotImplementedError("an embedding with max_norm renormalises its rows in place; it can't be packed.")
    return weight.embedding(index)


def _addmm(bias: torch.Tensor, x: torch.Tensor, weight: Any) -> torch.Tensor:
    assert isinstance(weight, PackedTensor) and weight.transposed
    return weight.linear(x, bias)


def _matmul(x: torch.Tensor, weight: Any) -> torch.Tensor:
    assert isinstance(weight, PackedTensor) and weight.transposed
    return weight.linear(x)


def _transpose(weight: Any) -> PackedTensor:
    """The same matrix, seen from its other side: nothing is stored or moved."""
    return PackedTensor(weight.blocks, dtype=weight.dtype, device=weight.device, transposed=not weight.transposed)


_HANDLERS: dict[Callable, Callable[..., Any]] = {
    torch.Tensor.detach: lambda weight: weight,
    F.linear: _linear,
    F.embedding: _embedding,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.T.__get__: _transpose,  # type: ignore[attr-defined]
}
