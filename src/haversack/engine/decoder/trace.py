"""One decode step of a transformers model as a graph: what its own code does between matrix products and attention.

The model runs once on `TRACED_ROWS` sequences of one token. Matrix products, embeddings and attention are taken down where
they are called and return tensors of the right shape without computing; every other operation is taken down as torch
dispatches it. Which numbers an operation reads is told by the tensors themselves (storage, offset, strides), so that views
need no names; what depends on parameters alone is computed once and kept. So no architecture is known here by name. An
operation that is not compiled is kept as a call of torch between what is; so are experts, whose module picks matrices by
what it is given. What is neither makes the graph `unsupported`, which names it.

Tensors that a layer gets beside hidden states and that depend on positions alone (rotary tables) are inputs of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from haversack.engine.packed_tensor import PackedStack, PackedTensor
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

_POWERS = {2.0: "square", 3.0: "cube", 0.5: "sqrt", -0.5: "rsqrt"}


@dataclass(frozen=True)
class Layout:
    """A tensor that was made and let go: how its numbers lie, in tensors' own words."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        return cls(tensor.shape, tensor.stride(), tensor.dtype, int(tensor.storage_offset()))

    def stride(self, axis: int) -> int:
        return self.strides[axis]

    def numel(self) -> int:
        return self.shape.numel()


@dataclass(eq=False)
class Node:
    """One tensor that was made: `kind` is "map", "mean", "cat", "stack", "linear", "embedding", "attention", "torch" (of what `facts["call"]` makes of the
    inputs, the result `facts["index"]`), "constant", "tokens", "positions", "table" (a function of positions that
    layers get), or "unknown"."""

    kind: str
    op: str
    inputs: tuple[View | float, ...]
    layout: Layout
    tensor: torch.Tensor | None = field(default=None, repr=False)  # of a constant alone
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
    device = _device_of(model)
    tokens = torch.zeros(TRACED_ROWS, 1, dtype=torch.int64, device=device)
    positions, ones = torch.zeros_like(tokens), torch.ones_like(tokens)
    recorder.register(tokens, "tokens", "tokens")
    recorder.register(positions, "positions", "positions")
    hooks = [
        layer.register_forward_pre_hook(recorder.layer_hook(i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    experts = [m for m in model.modules() if any(p.ndim == 3 for p in m.parameters(recurse=False))]
    for module in experts:
        module.forward = partial(recorder.call_experts, module.forward)
    model.set_attn_implementation(TRACE_ATTENTION)
    _ACTIVE.append(recorder)
    try:
        # in inference mode operations would arrive in other words
        with torch.inference_mode(False), torch.no_grad(), _Functions(recorder), recorder:
            # a mask, or transformers would look into the positions for packed sequences, which `meta` has no values for
            given = {"input_ids": tokens, "attention_mask": ones, "position_ids": positions}
            output = model(**given, use_cache=False, logits_to_keep=1)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, IndexError, KeyError) as error:
        raise UnsupportedModelError(f"a step can't be traced ({' '.join(str(error).split())[:160]})") from error
    finally:
        _ACTIVE.pop()
        for hook in hooks:
            hook.remove()
        for module in experts:
            del module.forward  # the class's own comes back
        model.set_attn_implementation(attention_name)
    logits = recorder.view(output.logits)
    return StepGraph(_live(recorder.nodes, logits.node), logits, recorder.tables)


def _device_of(model: nn.Module) -> torch.device:
    """Where what is not packed lies; GPT-2 has no buffers."""
    plain = (p for p in model.parameters() if not isinstance(p, (PackedTensor, PackedStack)))
    return next(iter((*model.buffers(), *plain)), torch.empty(0)).device


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
    recorder.register(out, "attention", "attention", views, **facts)
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
        if func is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        if func is torch.addmm and not kwargs:  # GPT-2's Conv1D, whose weight is `(in, out)`
            bias, x, weight = args
            return self._linear(x, weight if isinstance(weight, PackedTensor) else weight.t(), bias)
        asks = getattr(func, "__name__", "") == "__get__"  # for a dtype or a shape, as Gemma's embeddings do
        if not asks and any(isinstance(x, PackedTensor | PackedStack) for x in args):
            raise UnsupportedModelError(f"a packed weight meets {getattr(func, '__name__', func)}")
        return func(*args, **kwargs)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        source = self.recorder.view(x)
        if source.node.is_constant:
            return F.linear(x, weight, bias)
        out_features = weight.shape[1 if getattr(weight, "transposed", False) else 0]
        out = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype, device=x.device)
        self.recorder.register(out, "linear", "linear", (source,), weight=weight)
        return out if bias is None else out + bias

    def _embedding(self, index: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        source = self.recorder.view(index)
        out = torch.empty(*index.shape, weight.shape[1], dtype=weight.dtype, device=index.device)
        if source.node.kind in ("tokens", "positions"):
            self.recorder.register(out, "embedding", source.node.kind, (source,), weight=weight)
        else:  # OPT counts its positions from two
            call = _Call(lambda index: F.embedding(index, weight), (index,), {})
            self.recorder.register(out, "torch", "embedding", (source,), call=call, index=0)
        return out


class _Recorder(TorchDispatchMode):
    """Takes every operation down that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.tables: dict[Node, tuple[int, tuple[Any, ...]]] = {}
        self._by_storage: dict[int, Node] = {}

    def register(self, tensor: torch.Tensor, kind: str, op: str, inputs: tuple[Any, ...] = (), **facts: Any) -> None:
        """The tensor is what its storage holds from now on. Whoever gets that storage later is registered in its turn."""
        node = Node(kind, op, inputs, Layout.of(tensor), tensor.detach() if kind == "constant" else None, facts)
        self.nodes.append(node)
        self._by_storage[_storage(tensor)] = node

    def view(self, tensor: torch.Tensor) -> View:
        node = self._by_storage.get(_storage(tensor))
        if node is None:  # a parameter or buffer, or made of such
            self.register(tensor, "constant", "parameter")
            node = self.nodes[-1]
        return View(node, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))

    def layer_hook(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            for path, tensor in tensors_in((args, kwargs)):
                node = self._by_storage.get(_storage(tensor))
                if node is None or node.kind in ("positions", "tokens", "table", "constant"):
                    continue
                if tensor.is_floating_point() and node.depends_on_positions_alone():
                    if not tensor.is_contiguous() or tensor.shape != node.layout.shape:
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
        in_place = name.endswith("_")
        call = _Call(_on_a_copy(func) if in_place else func, args, kwargs)
        for i, (_, made) in enumerate(tensors_in(out)):
            if any(_storage(made) == _storage(t) for t in tensors) and not in_place:
                continue  # a view
            kind, op, inputs = self._kind(name, args, kwargs, views, made)
            if kind == "unknown" and (not in_place or _is_whole(made)) and _is_row_by_row(args, kwargs):
                inputs = tuple(views[id(t)] for t in tensors)
                self.register(made, "torch", op, inputs, call=call, index=i)
            else:
                self.register(made, kind, op, inputs)
        return out

    def call_experts(self, forward: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        """In the place of an experts module's forward: its result is as its first argument is."""
        tensors = [t for _, t in tensors_in((args, kwargs))]
        views = tuple(self.view(t) for t in tensors)
        out = torch.empty_like(tensors[0])
        self.register(out, "torch", "experts", views, call=_Call(forward, args, kwargs), index=0)
        return out

    def _kind(
        self, name: str, args: Any, kwargs: Any, views: Mapping[int, View], out: torch.Tensor
    ) -> tuple[str, str, tuple[Any, ...]]:
        """Kind, operation and inputs of what an operation made."""
        sources = tuple(views.values())
        if all(source.node.is_constant for source in sources):
            return "constant", name, ()
        in_place = name.endswith("_")
        plain = name.removesuffix("_") if in_place else name
        inputs = tuple(views[id(x)] if isinstance(x, torch.Tensor) else x for x in args)
        unknown = "unknown", f"{name} of {out.dtype}", sources
        if not out.is_floating_point():
            return unknown
        if in_place and not _is_whole(out):
            return unknown
        numbers = tuple(float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) else x for x in inputs)
        if plain in _MAPS:
            arity = 2 if plain in ("add", "sub", "mul", "div") else 1
            if kwargs.get("alpha", 1) == 1 and kwargs.get("rounding_mode") is None and _operands(numbers[:arity]):
                return "map", _MAPS[plain], numbers[:arity]
        elif plain == "copy":
            if _operands(numbers[1:2]):
                return "map", "copy", numbers[1:2]
        elif plain == "pow" and numbers[1] in _POWERS:
            return "map", _POWERS[numbers[1]], numbers[:1]
        elif plain == "gelu":
            return "map", "gelu_tanh" if kwargs.get("approximate") == "tanh" else "gelu", numbers[:1]
        elif plain == "mean" and args[1] in ([-1], [out.ndim - 1]) and len(args) > 2 and args[2]:
            return "mean", "mean", numbers[:1]
        elif plain == "cat":
            axis = (args[1] if len(args) > 1 else 0) % out.ndim
            if axis == out.ndim - 1:
                return "cat", "cat", tuple(views[id(t)] for t in args[0])
        elif plain == "stack" and (args[1] if len(args) > 1 else 0) % out.ndim == out.ndim - 1:
            return "stack", "stack", tuple(views[id(t)] for t in args[0])
        return unknown


def _layer_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """What torch computes in one operation, in float32 as it does, by operations that steps are made of."""
    if len(normalized_shape) != 1:
        raise UnsupportedModelError("a norm runs over several axes")
    centered = x.float()
    centered = centered - centered.mean(-1, keepdim=True)
    out = centered * torch.rsqrt((centered * centered).mean(-1, keepdim=True) + eps)
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    return out.to(x.dtype)


class _Call:
    """A call with its tensors taken out: with others in their places, the tensors that it returns."""

    def __init__(self, function: Callable, args: Any, kwargs: Any):
        self.function = function
        self.args, self.kwargs = _replaced((args, kwargs), lambda _: _PLACE)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        given = iter(tensors)
        args, kwargs = _replaced((self.args, self.kwargs), lambda _: next(given))
        return [t for _, t in tensors_in(self.function(*args, **kwargs))]


_PLACE = object()


def _replaced(nest: Any, replace: Callable[[Any], Any]) -> Any:
    """The same nest with what `replace` makes of each tensor, or of each place of one."""
    if nest is _PLACE or (isinstance(nest, torch.Tensor) and not isinstance(nest, PackedTensor)):
        return replace(nest)
    if isinstance(nest, Mapping):
        return {key: _replaced(value, replace) for key, value in nest.items()}
    if isinstance(nest, (list, tuple)):
        return type(nest)(_replaced(value, replace) for value in nest)
    return nest


def _on_a_copy(func: Callable) -> Callable:
    """An operation in place, of its first argument, as one that leaves that as it is."""
    return lambda first, *args, **kwargs: func(first.clone(), *args, **kwargs)


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all that its storage holds."""
    return not tensor.storage_offset() and tensor.nbytes == tensor.untyped_storage().nbytes()


def _is_row_by_row(args: Any, kwargs: Any) -> bool:
    """Whether no argument is a shape that names the traced number of sequences."""
    lists = [x for x in (*args, *kwargs.values()) if isinstance(x, (list, tuple))]
    return not any(TRACED_ROWS in x for x in lists if all(isinstance(n, int) for n in x))


def _operands(inputs: tuple[Any, ...]) -> bool:
    return all(isinstance(x, (View, float)) for x in inputs)


def _storage(tensor: torch.Tensor) -> int:
    """What tells storages apart, on `meta` too."""
    return tensor.untyped_storage()._cdata
