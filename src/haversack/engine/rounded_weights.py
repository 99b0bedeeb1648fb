"""Weights trained in few bits: matrices of the layers in 8, all else in 16, each update rounded at random so that it is right on average."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from haversack.describe.checkpoint import torch_dtype
from haversack.describe.model import Model
from haversack.engine.adapters import ReadMatrix, matrix_of, whole_linears
from haversack.engine.optimizers import Stepper
from haversack.ledger import StoredTensor
from haversack.parts.optimizer.base import Moment
from haversack.parts.optimizer.integer_state import IntegerState

WEIGHT_CODES = IntegerState(bits=8, stochastic=True)
"""Integers of 8 bits under a scale per 256 weights, as in the source."""

ROUND_ELEMENTS = 2**20
"""Numbers unpacked and rounded at a time: a multiple of all blocks."""

ROUND_BYTES_PER_ELEMENT = 15
"""What rounding holds for each of `ROUND_ELEMENTS` numbers beside matrix and codes: 14.03 were counted, of matrices in 16 bits with 0.26 and 1
million."""


def codes_of(shape: tuple[int, ...]) -> tuple[StoredTensor, ...]:
    """The tensors of a matrix in 8 bits."""
    return WEIGHT_CODES.stored(_as_moment(shape))


def _as_moment(shape: tuple[int, ...]) -> Moment:
    return Moment("codes", shape, signed=True)


def stand_in(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of this shape on the storage of one number: what gradients are asked for, where the values are kept as codes."""
    return torch.zeros(1, dtype=dtype, device=device).expand(shape)


class RoundedTensor:
    """A matrix's codes and scales."""

    def __init__(self, shape: tuple[int, ...], device: torch.device):
        self.moment = _as_moment(shape)
        self.stored = {t.name: torch.empty(t.shape, dtype=torch_dtype(t.dtype), device=device) for t in codes_of(shape)}

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix, a new tensor."""
        codes = self.stored["codes"]
        matrix = torch.empty(len(codes), dtype=dtype, device=codes.device)
        for piece in self._pieces():
            matrix[piece] = WEIGHT_CODES.read(self.stored, {}, self.moment, piece)
        return matrix.view(self.moment.shape)

    def round_(self, matrix: torch.Tensor) -> None:
        """Store values, each rounded up or down at random."""
        flat = matrix.reshape(-1)
        for piece in self._pieces():
            WEIGHT_CODES.write(self.stored, {}, self.moment, piece, flat[piece].float())

    def _pieces(self) -> Iterable[slice]:
        n = len(self.stored["codes"])
        return (slice(start, min(start + ROUND_ELEMENTS, n)) for start in range(0, n, ROUND_ELEMENTS))


class RoundedLinear(nn.Module):
    """`y = x W^T` where `W` `(out, in)` lies in 8 bits: each product unpacks it, uses it and drops it. `weight` stands for it where gradients are
    asked for, and holds nothing."""

    codes: torch.Tensor
    codes_scale: torch.Tensor

    def __init__(self, base: nn.Module, matrix: torch.Tensor):
        super().__init__()
        self.is_transposed = hasattr(base, "nf")
        self.rounded = RoundedTensor(tuple(matrix.shape), matrix.device)
        if matrix.device.type != "meta":
            self.rounded.round_(matrix)
        for name, tensor in self.rounded.stored.items():
            self.register_buffer(name, tensor)
        self.weight = nn.Parameter(stand_in(tuple(matrix.shape), matrix.dtype, matrix.device))
        bias: Any = getattr(base, "bias", None)
        self.bias = bias

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RoundedLinear:
        super()._apply(fn, recurse)
        self.rounded.stored = {"codes": self.codes, "codes_scale": self.codes_scale}
        moved = self.weight
        self.weight = nn.Parameter(stand_in(tuple(moved.shape), moved.dtype, moved.device), moved.requires_grad)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _RoundedProduct.apply(x, self.weight, self.rounded)
        return y if self.bias is None else y + self.bias

    def whole_linear(self) -> nn.Module:
        """An ordinary linear (or transposed one) with these values."""
        from transformers.pytorch_utils import Conv1D

        matrix = self.rounded.unpack(self.weight.dtype)
        out_features, in_features = matrix.shape
        with torch.device("meta"):
            linear: Any = (
                Conv1D(out_features, in_features) if self.is_transposed else nn.Linear(in_features, out_features)
            )
        linear.weight = nn.Parameter(matrix.T.contiguous() if self.is_transposed else matrix)
        linear.bias = self.bias
        return linear


class _RoundedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, rounded: RoundedTensor) -> torch.Tensor:
        ctx.rounded = rounded
        ctx.save_for_backward(x)
        return F.linear(x, rounded.unpack(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        (grad,), (x,) = grads, ctx.saved_tensors
        back = grad @ ctx.rounded.unpack(grad.dtype) if ctx.needs_input_grad[0] else None
        return back, grad.flatten(0, -2).T @ x.flatten(0, -2), None


def round_weights(model: nn.Module, described: Model, read: ReadMatrix | None = None) -> None:
    """Put the linears of the layers into 8 bits, one at a time; those left on meta are read by `read`."""
    for site, module in whole_linears(model, described):
        linear = RoundedLinear(module, matrix_of(module, site, read))
        parent, _, name = site.module.rpartition(".")
        setattr(model.get_submodule(parent), name, linear)


def rounded_of(model: nn.Module) -> dict[str, RoundedLinear]:
    """Name of the linear -> its form in 8 bits."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoundedLinear)}


def release_rounded(model: nn.Module) -> None:
    """Give a model ordinary linears back, one at a time."""
    for name, module in rounded_of(model).items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module.whole_linear())


class RoundedWeights(Stepper):
    """Weights without 32-bit copies: each is unpacked, updated in 32 bits and rounded back at random, one tensor at a time.

    `make` builds the optimizer of their 32-bit forms, which come in the order of `parameters` and hold values only while they are updated. `rounded` gives the codes of those kept
    in 8 bits, by the parameter's id; all others are rounded to their own dtype, at random as well, where it is bfloat16. Error: a step's rounding has no bias; its variance is at most a
    fourth of a step of the integers, squared. Source: Zhang et al. 2024, arXiv 2407.08296, section 3.4; differs in that embeddings and norms are
    rounded at random, too.
    """

    drops_gradients: ClassVar[bool] = True

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        make: Callable[[Sequence[nn.Parameter]], Stepper],
        rounded: dict[int, RoundedTensor],
    ):
        self.rounded = rounded
        self.pairs = [(p, nn.Parameter(stand_in(tuple(p.shape), torch.float32, p.device))) for p in parameters]
        self._wide = {id(parameter): wide for parameter, wide in self.pairs}
        self.inner = make([wide for _, wide in self.pairs])
        super().__init__(self.inner.optimizers)

    def step(self) -> None:
        for parameter, _ in self.pairs:
            if parameter.grad is not None:
                self.update(parameter)

    @torch.no_grad()
    def update(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        wide, rounded = self._wide[id(parameter)], self.rounded.get(id(parameter))
        nothing = wide.data
        wide.data = parameter.detach().float() if rounded is None else rounded.unpack(torch.float32)
        wide.grad = parameter.grad.float()
        parameter.grad = None
        self.inner.update(wide)
        if rounded is not None:
            rounded.round_(wide)
        elif parameter.dtype == torch.bfloat16:
            parameter.copy_(rounded_at_random(wide))
        else:
            parameter.copy_(wide)
        wide.data = nothing

    def zero_grad(self) -> None:
        for parameter, wide in self.pairs:
            parameter.grad = wide.grad = None


def rounded_at_random(values: torch.Tensor) -> torch.Tensor:
    """Float32 to bfloat16, up or down with the chance of the distance: 16 random bits are added below those that stay."""
    bits = values.detach().contiguous().view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device)
    return noise.add_(bits).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)
