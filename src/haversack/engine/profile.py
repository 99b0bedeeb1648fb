"""What one forward pass allocates beside weights and cache, from the model's own code on tensors without memory.

The real modules run on `meta`, two layers of each kind (a forward pass that saves nothing for a backward pass holds no
layer's activations while the next one runs; but from the second layer on, the embeddings live beside the hidden states). Packed matrices and attention are probes: they allocate their results and
note how many bytes live while they run, so that any option's workspace can be added afterwards without running again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from haversack.describe.checkpoint import torch_dtype
from haversack.describe.model import Model
from haversack.describe.site import WeightSite
from haversack.describe.skeleton import build_skeleton, to_loaded_dtype
from haversack.describe.weights import layer_of
from haversack.engine.attach import PackedSite, attach, take_off
from haversack.engine.packed_tensor import PackedMatrix
from haversack.engine.trace import LiveBytes
from haversack.errors import UnsupportedModelError
from haversack.parts.weights.base import WeightOption

PROBE_ATTENTION = "haversack_probe"

LAST_SHOWN = 1
"""The last expert of a layer that runs; those after it are like it."""


@dataclass(frozen=True)
class ActivationProfile:
    """Live bytes of one forward pass of `new_tokens` for each of `batch_size` sequences, results included.

    `peak_bytes` is the most at any time, workspaces left out; `at_site` and `at_attention` (by layer) are what lives
    while that site's product, or that layer's attention, runs.
    """

    batch_size: int
    new_tokens: int
    peak_bytes: int
    at_site: Mapping[str, int] = field(repr=False)
    at_attention: Mapping[int, int] = field(repr=False)


def profile_forward(model: Model, *, batch_size: int, new_tokens: int, dtype: str | None = None) -> ActivationProfile:
    """Trace one forward pass that computes the last token's logits, as `generate` does.

    Takes about half a second for a layer of any width; allocates nothing.
    """
    compute = torch_dtype(dtype or model.dtype)
    skeleton: Any = build_skeleton(model.config, model.name)
    to_loaded_dtype(skeleton, compute)
    skeleton.eval()
    kinds = layer_kinds(model)
    shown = {layer for same in kinds.values() for layer in same}
    skip_layers_but(skeleton, model, shown)
    sites = [site for site in model.weights if site.layer is None or site.layer in shown]
    probe = _Probe()
    if any(site.expert is not None for site in sites):
        skeleton.set_experts_implementation("eager")  # as when it is loaded
    take_off(skeleton, sites)
    attach(
        skeleton,
        [PackedSite(site, probe.matrix(site.id, site.out_features, site.in_features)) for site in sites],
        compute,
    )
    for module in skeleton.modules():
        if any(getattr(tensor, "experts", None) for tensor in module.parameters(recurse=False)):
            module.forward = _traced_experts(module)
    _register_probe_attention()
    skeleton.set_attn_implementation(PROBE_ATTENTION)
    tokens = torch.zeros(batch_size, new_tokens, dtype=torch.int64, device="meta")
    ones, positions = torch.ones_like(tokens), torch.zeros_like(tokens)
    with torch.no_grad(), LiveBytes() as live:
        probe.live = live
        _ACTIVE.append(probe)
        try:
            skeleton(input_ids=tokens, attention_mask=ones, position_ids=positions, use_cache=False, logits_to_keep=1)
        finally:
            _ACTIVE.pop()
    attended = probe.at_attention
    if sorted(attended) != sorted(shown):
        raise UnsupportedModelError(
            f"{model.name} ({model.model_type}) does not call transformers' attention function in each layer; what it "
            "allocates there is unknown."
        )
    return ActivationProfile(
        batch_size,
        new_tokens,
        live.peak_bytes,
        at_site={site.id: max(probe.at_site[name] for name in _traced_ids(site, kinds)) for site in model.weights},
        at_attention={site.layer: max(attended[layer] for layer in kinds[site.layer]) for site in model.attention},
    )


class _Probe:
    """Collects live bytes at each packed product and each attention call."""

    def __init__(self) -> None:
        self.live: LiveBytes | None = None
        self.at_site: dict[str, int] = {}
        self.at_attention: dict[int, int] = {}

    def matrix(self, site_id: str, out_features: int, in_features: int) -> PackedMatrix:
        return _ProbeMatrix(site_id, WeightOption(), out_features, in_features, dict, self)

    def note_site(self, site_id: str) -> None:
        assert self.live is not None
        self.at_site[site_id] = max(self.at_site.get(site_id, 0), self.live.live_bytes)


@dataclass(frozen=True)
class _ProbeMatrix(PackedMatrix):
    probe: _Probe

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(*x.shape[:-1], self.out_features)
        self.probe.note_site(self.site_id)
        return y

    def rows(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        y = torch.empty(*index.shape, self.in_features, dtype=dtype, device=index.device)
        self.probe.note_site(self.site_id)
        return y


_ACTIVE: list[_Probe] = []
"""The probe of the trace that is running, if any: transformers calls attention functions by name."""


def _probe_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Allocates the result `(batch, tokens, heads, head_dim)` and notes what lives."""
    batch_size, num_heads, num_tokens, _ = query.shape
    out = query.new_empty(batch_size, num_tokens, num_heads, value.shape[-1])
    probe = _ACTIVE[-1]
    assert probe.live is not None
    probe.at_attention[module.layer_idx] = probe.live.live_bytes  # type: ignore[index]
    return out, None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _register_probe_attention() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PROBE_ATTENTION, _probe_attention)
    AttentionMaskInterface.register(PROBE_ATTENTION, _no_mask)


def layer_kinds(model: Model) -> dict[int, tuple[int, ...]]:
    """For each layer, the first two layers with the same sites, the same other tensors and the same attention."""
    facts: dict[int, list[Any]] = {layer: [] for layer in range(model.num_layers)}
    for tensor in model.rest:
        layer = layer_of(tensor.name)
        if layer in facts:
            facts[layer].append((tensor.name.replace(f".{layer}.", ".", 1), tensor.dtype, tensor.shape))
    for site in model.weights:
        if site.layer in facts:
            facts[site.layer].append((site.role, site.out_features, site.in_features, site.expert))
    for attention in model.attention:
        facts[attention.layer].append(dataclasses.replace(attention, id="", module="", layer=0))
    alike: dict[tuple, list[int]] = {}
    for layer, rows in facts.items():
        alike.setdefault(tuple(rows), []).append(layer)
    return {layer: tuple(layers[:2]) for layers in alike.values() for layer in layers}


def skip_layers_but(skeleton: nn.Module, model: Model, kept: set[int]) -> None:
    """Leave the layers `kept`, under their own indices; hidden states pass the others."""
    for module in skeleton.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == model.num_layers:
                outputs: list[int] = []
                for layer in range(model.num_layers):
                    if layer in kept:
                        child[layer].register_forward_hook(_note_outputs(outputs))
                    else:
                        child[layer] = _Skip(outputs)
                return


def _note_outputs(outputs: list[int]) -> Any:
    """How many things a real layer returns in a tuple; 0 for a tensor alone."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        outputs[:] = [len(output) if isinstance(output, tuple) else 0]

    return hook


class _Skip(nn.Module):
    """A layer left out of a trace: hidden states pass, in a tuple where the layer before it (the first is never left out)
    returned one."""

    def __init__(self, outputs: list[int]):
        super().__init__()
        self._outputs = outputs

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        num_outputs = self._outputs[0]
        return (hidden_states, *(None,) * (num_outputs - 1)) if num_outputs else hidden_states

    def __getattr__(self, name: str) -> Any:  # models ask layers for facts such as `attention_type`
        try:
            return super().__getattr__(name)
        except AttributeError:
            return "full_attention"


def _traced_experts(module: nn.Module) -> Any:
    """Experts whose routing can't be known beforehand, by their own code: the worst case, every token in each of the first ones, beside
    which those after them hold nothing more. Code that can't be run so is taken as two products with a gate between them."""
    own, dense = module.forward, _dense_experts(module)

    def forward(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        with suppress(RuntimeError, NotImplementedError, TypeError, ValueError, IndexError), _EveryTokenRouted():
            return own(*args, **kwargs)
        return dense(*args, **kwargs)

    return forward


class _EveryTokenRouted(TorchFunctionMode):
    """Finds the first entries of a vector to be there (which experts are met), and all columns of a matrix (which tokens meet one)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_search = func in (torch.Tensor.nonzero, torch.nonzero) or (func is torch.where and len(args) == 1)
        if not is_search or not args[0].is_meta or args[0].ndim > 2:
            return func(*args, **(kwargs or {}))
        if args[0].ndim == 1:
            return torch.arange(len(args[0]))[: LAST_SHOWN + 1, None]
        found = torch.empty(2, args[0].shape[1], dtype=torch.int64, device="meta")
        return found.unbind() if func is torch.where else found.T


def _dense_experts(module: nn.Module) -> Any:
    """Every token in one expert of two products with a gate between them."""

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden_states)
        first, last = [p for p in module.parameters(recurse=False) if p.ndim == 3]
        mask = F.one_hot(torch.zeros_like(top_k_index), len(first) + 1)  # the real modules hold one as well
        x = torch.empty_like(hidden_states)
        experts = list(zip(first.experts, last.experts, strict=True))  # type: ignore[attr-defined]
        for into, out_of in experts[: LAST_SHOWN + 1]:  # beside the first there is nothing of an expert before it
            hidden = into.linear(x)
            half = hidden.shape[-1] // 2
            hidden = out_of.linear(F.silu(hidden[..., :half]) * hidden[..., half:])
        weighted = hidden * top_k_weights.new_empty(hidden.shape[0], 1)
        del mask
        return result + weighted

    return forward


def _traced_ids(site: WeightSite, kinds: Mapping[int, tuple[int, ...]]) -> list[str]:
    """The ids of the same site in the layers, and of the expert, that were traced."""
    traced = site.id
    if site.expert is not None and site.expert > LAST_SHOWN:
        traced = traced.replace(f"#{site.expert}.", f"#{LAST_SHOWN}.", 1)
    if site.layer is None:
        return [traced]
    return [traced.replace(f".{site.layer}.", f".{layer}.", 1) for layer in kinds[site.layer]]
