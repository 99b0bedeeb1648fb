"""A transformers model held one decoder layer at a time: the tree is on meta, and weights come and go.

The layers' inputs other than hidden states (position embeddings, a mask per layer type) are what the model's own
forward passes to them, recorded once per batch size; what comes before and after the layers (embeddings, final norm,
head, logit scaling) runs through the same forward, with the layers standing aside. So no architecture is known here
by name.

Memory: the parameters of one layer, or of what lies outside the layers, in the compute dtype; masks and position
embeddings of one batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from haversack.describe.assemble import read_parameter
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.model import Model, describe_model
from haversack.describe.site import TensorSlice, WeightSite
from haversack.describe.skeleton import build_skeleton
from haversack.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from haversack.engine.kv_cache import HaversackCache


@dataclass(frozen=True)
class LayerCall:
    """What the model passes to one layer besides hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Attended:
    """What one layer's attention got, after rotary embedding, `(1, heads or kv_heads, tokens, head_dim)`, how it attends (`scaling`, `softcap`,
    `sinks`), and what it gave, `(1, tokens, heads, head_dim)`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    how: dict[str, Any]
    output: torch.Tensor


class StreamedModel:
    """A causal language model whose weights are read when they are needed and freed after.

    `module` is the transformers model, its parameters on meta and its buffers real. `compute_dtype` is the dtype of
    materialised parameters: the config's own, but float32 for float16 models, whose gradients could underflow.
    """

    def __init__(self, described: Model, checkpoint: Checkpoint, compute_dtype: torch.dtype | None = None):
        self.described = described
        self.checkpoint = checkpoint
        self.module = build_skeleton(described.config, described.name, folder=str(described.folder or "") or None)
        self.module.eval()
        plain = all(site.softcap is None and not site.has_sinks for site in described.attention)
        if plain and getattr(self.module, "_supports_sdpa", False):  # fused, without a (heads, tokens, tokens) matrix
            self.module.set_attn_implementation("sdpa")
        self.module.config._experts_implementation = "eager"  # experts one by one, each with its own input
        if any(site.shares_with is not None for site in described.attention):
            raise self._unsupported("reuse the keys and values of others")
        self._meta = dict(self.module.named_parameters(remove_duplicate=False))
        self._persistent = set(self.module.state_dict().keys())
        own = next(iter(self._meta.values())).dtype
        self.compute_dtype = compute_dtype or (torch.float32 if own == torch.float16 else own)
        _fill_buffers(self.module)
        self._layers_path = _layers_path(described)
        self._calls: dict[tuple[int, ...], list[LayerCall]] = {}

    @classmethod
    def open(cls, source: str | Path | Model, compute_dtype: torch.dtype | None = None) -> StreamedModel:
        """A local folder (or a described one) with its checkpoint. Raises CheckpointError where there are no
        weights."""
        described = source if isinstance(source, Model) else describe_model(source)
        if described.folder is None:
            raise CheckpointError(
                f"{described.name!r} is described from its config alone; calibrating and packing need its weights, so "
                "name a local folder."
            )
        return cls(described, Checkpoint.open(described.folder), compute_dtype)

    @property
    def num_layers(self) -> int:
        return self.described.num_layers

    def layer_module(self, index: int) -> nn.Module:
        """The module of one layer, materialised or not."""
        return self.module.get_submodule(f"{self._layers_path}.{index}")

    def layer_sites(self, index: int) -> tuple[WeightSite, ...]:
        return tuple(site for site in self.described.weights if site.layer == index)

    def outside_sites(self) -> tuple[WeightSite, ...]:
        """Embeddings and head."""
        return tuple(site for site in self.described.weights if site.layer is None)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The layer's module, materialised inside the block and freed after it."""
        names = self._names_under(f"{self._layers_path}.{index}.")
        materialize(self, names)
        try:
            yield self.layer_module(index)
        finally:
            self._release(names)

    def run_layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The output of a materialised layer for `hidden` `(sequences, tokens, hidden_size)`."""
        call = self._layer_calls(hidden.shape[0], hidden.shape[1])[index]
        output = self.layer_module(index)(hidden, *call.args, **call.kwargs)
        if not isinstance(output, torch.Tensor):
            raise self._unsupported(f"return {type(output).__name__}, not hidden states alone")
        return output

    def run_layer_cached(self, index: int, hidden: torch.Tensor, cache: HaversackCache) -> torch.Tensor:
        """The output of a materialised layer for `hidden`, the tokens after those that `cache` has seen; no other
        layer runs or fills its part of the cache."""
        from haversack.engine import attention

        found = self._run_apart(index, hidden, attention.haversack_attention, past_key_values=cache, use_cache=True)
        for layer in cache.planned:  # positions are asked of the first layer
            layer.columns = cache.planned[index].columns
        return found

    def attended_in(self, index: int, hidden: torch.Tensor) -> Attended:
        """What a materialised layer's attention gets and gives for `hidden` `(1, tokens, hidden_size)`."""
        from haversack.engine import attention

        seen: list[Attended] = []

        def observe(
            module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, None]:
            output, _ = attention.haversack_attention(module, query, key, value, mask, **kwargs)
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            how = {"scaling": scaling, "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
            seen.append(Attended(query, key, value, how, output))
            return output, None

        self._run_apart(index, hidden, observe, use_cache=False)
        if len(seen) != 1:
            raise self._unsupported(f"attend {len(seen)} times each")
        return seen[0]

    def run_layer_given(self, index: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The output of a materialised layer whose attention gives `attended` `(1, tokens, heads, head_dim)`."""
        from haversack.engine import attention

        self._layer_calls(hidden.shape[0], hidden.shape[1])  # recorded under the model's own attention
        with attention.registered(self.module, "haversack-given", lambda *args, **kwargs: (attended, None)):
            return self.run_layer(index, hidden)

    def _run_apart(self, index: int, hidden: torch.Tensor, attend: Callable[..., Any], **inputs: Any) -> torch.Tensor:
        """The output of a materialised layer for `hidden`, as the whole model would call it with these inputs; no other layer runs."""
        from haversack.engine import attention

        found: list[torch.Tensor] = []

        def stand_in(number: int, passed: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
            if number == index:
                layer = self.layer_module(index)
                found.append(type(layer).forward(layer, hidden, *args, **kwargs))
            return passed

        names = [n for n in self._outside_names() if n not in (self.input_name, self.head_name)]
        materialize(self, names)
        try:
            with attention.registered(self.module, "haversack-apart", attend), self._layers_aside(stand_in):
                self.module.base_model(inputs_embeds=torch.zeros_like(hidden), **inputs)
        finally:
            self._release(names)
        return found[0]

    @contextmanager
    def before_layers(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """A function from token ids `(sequences, tokens)` to the first layer's hidden states; embeddings are loaded."""
        head = self.head_name
        names = [name for name in self._outside_names() if name != head or name in self._kept_of(self.input_name)]
        materialize(self, names)

        def embed(token_ids: torch.Tensor) -> torch.Tensor:
            hidden, calls = self._record(input_ids=token_ids)
            if hidden.shape != (*token_ids.shape, self.described.hidden_size) or not _same(
                calls, self._calls_with(tuple(token_ids.shape))
            ):
                raise self._unsupported("get more than hidden states from the tokens")
            return hidden

        try:
            yield embed
        finally:
            self._release(names)

    @contextmanager
    def after_layers(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """A function from the last layer's hidden states `(sequences, tokens, hidden_size)` to logits; the head is
        loaded."""
        embedding = self.input_name
        tied = self.head_name in self._kept_of(embedding)
        names = [name for name in self._outside_names() if tied or name != embedding]
        materialize(self, names)

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            with self._layers_aside(lambda index, h, args, kwargs: hidden):
                return self.module(inputs_embeds=torch.zeros_like(hidden), use_cache=False).logits

        try:
            yield logits
        finally:
            self._release(names)

    def _layer_calls(self, num_sequences: int, num_tokens: int) -> list[LayerCall]:
        shape = (num_sequences, num_tokens)
        if shape not in self._calls:
            names = [n for n in self._outside_names() if n not in (self.input_name, self.head_name)]
            materialize(self, names)
            self._calls_with(shape)
            self._release(names)
        return self._calls[shape]

    def _calls_with(self, shape: tuple[int, ...]) -> list[LayerCall]:
        """What layers get besides hidden states; positional parameters outside the layers must be materialised."""
        if shape not in self._calls:
            with torch.no_grad():
                dummy = torch.zeros(*shape, self.described.hidden_size, dtype=self.compute_dtype)
                self._calls[shape] = self._record(inputs_embeds=dummy)[1]
        return self._calls[shape]

    def _record(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, list[LayerCall]]:
        """Run everything but the layers; the first layer's hidden states, and what each layer gets besides."""
        first: list[torch.Tensor] = []
        calls: dict[int, LayerCall] = {}

        def record(index: int, hidden: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
            if not first:
                first.append(hidden)
            calls[index] = LayerCall(args, kwargs)
            return hidden

        try:
            with self._layers_aside(record):
                self.module.base_model(**inputs, use_cache=False)
        except (
            TypeError,
            ValueError,
            RuntimeError,
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
        ) as error:
            raise self._unsupported(f"can't stand aside ({' '.join(str(error).split())[:120]})") from error
        if list(calls) != list(range(self.num_layers)):
            raise self._unsupported("do not run each once, in order")
        return first[0], list(calls.values())

    def _unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"The layers of {self.described.name!r} ({self.described.architecture}) {what}, so they can't be run one at a "
            "time; plan it with cited damage instead of calibrating."
        )

    @contextmanager
    def _layers_aside(self, stand_in: Callable[[int, torch.Tensor, tuple, dict], torch.Tensor]) -> Iterator[None]:
        """Every layer's forward replaced by `stand_in(index, hidden, other args, kwargs)`."""
        layers = [self.layer_module(i) for i in range(self.num_layers)]

        def forward_of(index: int) -> Callable[..., torch.Tensor]:
            def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
                named = "hidden_states" in kwargs
                hidden = kwargs.pop("hidden_states") if named else args[0]
                return stand_in(index, hidden, args if named else args[1:], kwargs)

            return forward

        for i, layer in enumerate(layers):
            layer.forward = forward_of(i)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward  # the class's own comes back

    def _names_under(self, prefix: str) -> list[str]:
        return [name for name in self._persistent if name.startswith(prefix)]

    def _outside_names(self) -> list[str]:
        """Parameters outside the layers that belong to the text decoder or are the head."""
        decoder = self._layers_path.rpartition(".")[0] + "."
        head = self.head_name
        inside = self._layers_path + "."
        return [n for n in self._persistent if (n.startswith(decoder) and not n.startswith(inside)) or n == head]

    @property
    def input_name(self) -> str:
        return f"{_path_of(self.module, self.module.get_input_embeddings())}.weight"

    @property
    def head_name(self) -> str:
        return f"{_path_of(self.module, self.module.get_output_embeddings())}.weight"

    def _kept_of(self, name: str) -> tuple[str, ...]:
        """All names that share this one's storage, itself included."""
        for kept, others in self.described.tied.items():
            if name in (kept, *others):
                return (kept, *others)
        return (name,)

    def _release(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._meta:
                _assign(self.module, name, self._meta[name])


def materialize(model: StreamedModel, names: Iterable[str]) -> None:
    """Read parameters (and persistent buffers) from the checkpoint into the module, in the compute dtype; tied ones
    once."""
    loaded: dict[str, nn.Parameter | torch.Tensor] = {}
    for name in names:
        shared = next((loaded[other] for other in model._kept_of(name) if other in loaded), None)
        if shared is None:
            path, _, parameter = name.rpartition(".")
            value = read_parameter(model.checkpoint, model.described, path, parameter)
            if name in model._meta:
                shared = nn.Parameter(value.to(model.compute_dtype), requires_grad=False)
            else:
                shared = value
            loaded[name] = shared
        _assign(model.module, name, shared)


def matrix_view(parameter: torch.Tensor, module_slice: TensorSlice) -> torch.Tensor:
    """The view `(out_features, in_features)` of a module's parameter that a site cuts: writing to it changes the
    module."""
    view = parameter.data
    for axis, (start, stop) in enumerate(module_slice.index):
        view = view.narrow(axis, start, stop - start)
    if module_slice.squeeze:
        view = view.squeeze(0)
    if module_slice.transposed:
        view = view.T
    return view[:: module_slice.row_step]


def site_rows(site: WeightSite) -> slice:
    """Which outputs of its parameter's product a site's rows are."""
    cut = site.module_slice
    axis = int(cut.squeeze) + int(cut.transposed)
    if axis < len(cut.index):
        start, stop = cut.index[axis]
        return slice(start, stop, cut.row_step)
    return slice(None, None, cut.row_step)


def _same(first: Any, second: Any) -> bool:
    """Whether two nests of arguments are equal, tensors by value."""
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        return isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, LayerCall) and isinstance(second, LayerCall):
        return _same(first.args, second.args) and _same(first.kwargs, second.kwargs)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(_same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def _assign(root: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = root.get_submodule(path)
    table = owner._parameters if leaf in owner._parameters else owner._buffers
    table[leaf] = value  # type: ignore[assignment]


def _path_of(root: nn.Module, module: nn.Module) -> str:
    return next(path for path, candidate in root.named_modules() if candidate is module)


def _layers_path(described: Model) -> str:
    """Path of the list of layers: what precedes the first number in the sites' module paths."""
    for site in described.weights:
        if site.layer is not None:
            match = re.match(r"(.+?)\.\d+(\.|$)", site.module)
            assert match is not None
            return match[1]
    raise UnsupportedModelError(f"{described.name!r} has no layers with matrices; there is nothing to calibrate.")


def _fill_buffers(module: Any) -> None:
    """Compute the buffers that lie in no checkpoint (rotary frequencies, embedding scales), as on loading."""
    for name, buffer in list(module.named_non_persistent_buffers()):
        _assign(module, name, torch.empty_like(buffer, device="cpu"))
    for parameter in module.parameters():
        parameter._is_hf_initialized = True
    module.initialize_weights()
