"""One decode step of a transformers model as a graph: what its own code does between matrix products and attention.

The model runs once on `TRACED_ROWS` sequences of one token. Matrix products, embeddings and attention are taken down where
they are called and return tensors of the right shape without computing; every other operation is taken down as torch
dispatches it. Which numbers an operation reads is told by the tensors themselves (storage, offset, strides), so that views
need no names; what depends on parameters alone is computed once and kept. So no architecture is known here by name, and an
operation that is not known makes the graph `unsupported`, which names it.

Tensors that a layer gets beside hidden states and that depend on positions alone (rotary tables) are inputs of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from haversack.engine.packed_tensor import PackedTensor
from haversack.errors import UnsupportedModelError

TRACED_ROWS = 3
"""Sequences in the traced step: a number that is no other axis's length, so that the batch is seen where it is."""

TRACE_ATTENTION = "haversack_decoder_trace"

_MAPS = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "div", "neg": "neg", "sqrt": "sqrt", "rsqrt": "rsqrt",
    "reciprocal": "reciprocal", "sigmoid": "sigmoid", "silu": "silu", "tanh": "tanh", "relu": "relu",
    "_to_copy": "copy", "clone": "copy",
}  # fmt: skip
"""Operations of one number each, by torch's name; `row_program` computes them."""

_COMMUTING = {"add", "mul"}


@dataclass(eq=False)
class Node:
    """One tensor that was made: `kind` is "map", "mean", "cat", "linear", "embedding", "attention", "constant", "tokens",
    "positions", "table" (a function of positions that layers get), or "unknown"."""

    kind: str
    op: str
    inputs: tuple[View | float, ...]
    tensor: torch.Tensor = field(repr=False)
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_constant(self) -> bool:
        return self.kind == "constant"

    @property
    def parents(self) -> Iterator[Node]:
        return (x.node for x in self.inputs if isinstance(x, View))

    def depends_on_positions_alone(self) -> bool:
        if self.kind in ("positions", "table"):
            return True
        if self.kind in ("tokens", "constant"):
            return self.kind == "constant"
        return bool(self.inputs) and all(parent.depends_on_positions_alone() for parent in self.parents)


@dataclass(frozen=True)
class View:
    """Elements of a node's storage, as a tensor sees them: the first axis is the batch, unless the node is a constant."""

    node: Node
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class StepGraph:
    """What one step computes: `nodes` in order, `logits` at the end. `tables` are the position inputs and, for each, the
    layer that gets it and where among its arguments."""

    nodes: tuple[Node, ...]
    logits: View
    tables: Mapping[Node, tuple[int, tuple[Any, ...]]]


def trace_step(model: Any, num_layers: int, attention_name: str) -> StepGraph:
    """Trace one step. Raises UnsupportedModelError naming what a graph can't hold; the model is left with
    `attention_name` as its attention function."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(TRACE_ATTENTION, _trace_attention)
    AttentionMaskInterface.register(TRACE_ATTENTION, lambda *args, **kwargs: None)
    layers = layers_of(model, num_layers)
    recorder = _Recorder()
    device = next(model.buffers(), torch.empty(0)).device
    tokens = torch.zeros(TRACED_ROWS, 1, dtype=torch.int64, device=device)
    positions = torch.zeros_like(tokens)
    recorder.register(Node("tokens", "tokens", (), tokens))
    recorder.register(Node("positions", "positions", (), positions))
    hooks = [
        layer.register_forward_pre_hook(recorder.layer_hook(i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    model.set_attn_implementation(TRACE_ATTENTION)
    _ACTIVE.append(recorder)
    try:
        with torch.no_grad(), _Functions(recorder), recorder:
            output = model(input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, IndexError, KeyError) as error:
        raise UnsupportedModelError(f"a step can't be traced ({' '.join(str(error).split())[:160]})") from error
    finally:
        _ACTIVE.pop()
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(attention_name)
    logits = recorder.view(output.logits)
    for node in recorder.nodes:  # what was computed is not wanted any more, only its shape
        if not node.is_constant:
            shape, strides = node.tensor.shape, node.tensor.stride()
            node.tensor = torch.empty_strided(shape, strides, dtype=node.tensor.dtype, device="meta")
    return StepGraph(_live(recorder.nodes, logits.node), logits, recorder.tables)


def layers_of(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of decoder layers."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise UnsupportedModelError("its layers lie in no list")


def tensors_in(nest: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    """Tensors of nested arguments with their paths."""
    if isinstance(nest, torch.Tensor):
        yield path, nest
    elif isinstance(nest, Mapping):
        for key, value in nest.items():
            yield from tensors_in(value, (*path, key))
    elif isinstance(nest, (list, tuple)):
        for i, value in enumerate(nest):
            yield from tensors_in(value, (*path, i))


def _live(nodes: list[Node], last: Node) -> tuple[Node, ...]:
    """What the result depends on, in the order it was made; constants and unknown nodes that nobody reads are gone."""
    wanted, open_ = {last}, [last]
    while open_:
        for parent in open_.pop().parents:
            if parent not in wanted:
                wanted.add(parent)
                open_.append(parent)
    live = tuple(node for node in nodes if node in wanted)
    unknown = next((node for node in live if node.kind == "unknown"), None)
    if unknown is not None:
        raise UnsupportedModelError(f"a step has the operation {unknown.op}, which is not compiled")
    return live


_ACTIVE: list[_Recorder] = []
"""The recorder of the trace that is running, if any: transformers calls attention functions by name."""


def _trace_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    batch_size, num_heads, num_tokens, width = query.shape
    out = torch.empty(batch_size, num_tokens, num_heads, value.shape[-1], dtype=query.dtype, device=query.device)
    recorder = _ACTIVE[-1]
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError("attention has position biases")
    sinks = kwargs.get("s_aux")
    facts = {
        "layer": getattr(module, "layer_idx", None),
        "scaling": width**-0.5 if scaling is None else scaling,
        "window": kwargs.get("sliding_window"),
        "softcap": kwargs.get("softcap"),
        "sinks": None if sinks is None else recorder.view(sinks),
    }
    views = tuple(recorder.view(x) for x in (query, key, value))
    recorder.register(Node("attention", "attention", views, out, facts))
    return out, None


class _Functions(TorchFunctionMode):
    """Takes matrix products and embeddings down where modules call them, whatever form their weights have."""

    def __init__(self, recorder: _Recorder):
        self.recorder = recorder

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.embedding:
            return self._embedding(*args, **kwargs)
        if any(isinstance(x, PackedTensor) for x in args):
            raise UnsupportedModelError(f"a packed weight meets {getattr(func, '__name__', func)}")
        return func(*args, **kwargs)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        source = self.recorder.view(x)
        if source.node.is_constant:
            return F.linear(x, weight, bias)
        out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)
        self.recorder.register(Node("linear", "linear", (source,), out, {"weight": weight}))
        return out if bias is None else out + bias

    def _embedding(self, index: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        source = self.recorder.view(index)
        if source.node.kind not in ("tokens", "positions"):
            raise UnsupportedModelError("an embedding looks up other numbers than tokens and positions")
        out = torch.empty(*index.shape, weight.shape[1], dtype=weight.dtype, device=index.device)
        self.recorder.register(Node("embedding", source.node.kind, (source,), out, {"weight": weight}))
        return out


class _Recorder(TorchDispatchMode):
    """Takes every operation down that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.tables: dict[Node, tuple[int, tuple[Any, ...]]] = {}
        self._by_storage: dict[int, Node] = {}

    def register(self, node: Node) -> None:
        """`node.tensor` is what its storage holds from now on."""
        self.nodes.append(node)  # keeps the tensor alive, so that no other gets its storage
        self._by_storage[_storage(node.tensor)] = node

    def view(self, tensor: torch.Tensor) -> View:
        node = self._by_storage.get(_storage(tensor))
        if node is None:  # a parameter or buffer, or made of such
            node = Node("constant", "parameter", (), tensor.detach())
            self._by_storage[_storage(tensor)] = node
            self.nodes.append(node)
        return View(node, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))

    def layer_hook(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            for path, tensor in tensors_in((args, kwargs)):
                node = self._by_storage.get(_storage(tensor))
                if node is None or node.kind in ("positions", "tokens", "table", "constant"):
                    continue
                if tensor.is_floating_point() and node.depends_on_positions_alone():
                    if not tensor.is_contiguous() or tensor.shape != node.tensor.shape:
                        raise UnsupportedModelError("its layers get a part of a table of positions")
                    node.kind, node.inputs = "table", ()
                    self.tables[node] = (layer, path)

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for _, t in tensors_in(args) if not isinstance(t, PackedTensor)]
        views = {id(t): self.view(t) for t in tensors}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        for made in [out] if isinstance(out, torch.Tensor) else [t for _, t in tensors_in(out)]:
            if any(_storage(made) == _storage(t) for t in tensors) and not name.endswith("_"):
                continue  # a view
            self.register(self._node(name, args, kwargs, views, made))
        return out

    def _node(self, name: str, args: Any, kwargs: Any, views: Mapping[int, View], out: torch.Tensor) -> Node:
        sources = tuple(views.values())
        if all(source.node.is_constant for source in sources):
            return Node("constant", name, (), out)
        in_place = name.endswith("_")
        plain = name.removesuffix("_") if in_place else name
        inputs = tuple(views[id(x)] if isinstance(x, torch.Tensor) else x for x in args)
        unknown = Node("unknown", f"{name} of {out.dtype}", sources, out)
        if not out.is_floating_point():
            return unknown
        if in_place and (out.storage_offset() or out.numel() * out.element_size() != out.untyped_storage().nbytes()):
            return unknown
        numbers = tuple(float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) else x for x in inputs)
        if plain in _MAPS:
            arity = 2 if plain in ("add", "sub", "mul", "div") else 1
            if kwargs.get("alpha", 1) == 1 and kwargs.get("rounding_mode") is None and _operands(numbers[:arity]):
                return Node("map", _MAPS[plain], numbers[:arity], out)
        elif plain == "copy":
            return Node("map", "copy", (numbers[1],), out) if _operands(numbers[1:2]) else unknown
        elif plain == "pow" and numbers[1] in (2.0, 0.5, -0.5):
            return Node("map", {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt"}[numbers[1]], numbers[:1], out)
        elif plain == "gelu" and kwargs.get("approximate") == "tanh":
            return Node("map", "gelu_tanh", numbers[:1], out)
        elif plain == "mean" and args[1] in ([-1], [out.ndim - 1]) and len(args) > 2 and args[2]:
            return Node("mean", "mean", numbers[:1], out)
        elif plain == "cat":
            axis = (args[1] if len(args) > 1 else 0) % out.ndim
            if axis == out.ndim - 1:
                return Node("cat", "cat", tuple(views[id(t)] for t in args[0]), out)
        return unknown


def _operands(inputs: tuple[Any, ...]) -> bool:
    return all(isinstance(x, (View, float)) for x in inputs)


def _storage(tensor: torch.Tensor) -> int:
    """What tells storages apart, on `meta` too."""
    return tensor.untyped_storage()._cdata
