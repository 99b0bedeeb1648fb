"""What serving holds where transformers' own cache is left to work: the model's own code and its own cache, on meta.

For models whose layers keep more or other than keys and values (states of linear attention and of state spaces, windows of
convolutions), share them, or attend in chunks. A prompt and one token more run; what each layer's cache holds after either is counted
on the cache object itself, so that new kinds of layers need no formula.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from haversack.describe.checkpoint import torch_dtype
from haversack.describe.model import Model
from haversack.describe.skeleton import build_skeleton, to_loaded_dtype
from haversack.engine.profile import layer_kinds, skip_layers_but
from haversack.engine.quiet import quiet_transformers
from haversack.engine.trace import LiveBytes
from haversack.engine.true_values import TrueValues
from haversack.errors import UnsupportedModelError


@dataclass(frozen=True)
class LayerCache:
    """One layer's cache of all sequences: bytes after the prompt, bytes that each further token of all sequences adds, and the
    most that it ever holds (None: no limit)."""

    prompt_bytes: int
    step_bytes: int
    limit_bytes: int | None

    def bytes_after(self, num_steps: int) -> int:
        """After the prompt and so many tokens more."""
        held = self.prompt_bytes + num_steps * self.step_bytes
        return held if self.limit_bytes is None else min(held, max(self.limit_bytes, self.prompt_bytes))


@dataclass(frozen=True)
class NativeServing:
    """`layers` in order; `prefill_bytes` and `decode_bytes` are the most that the prompt's pass and one step hold beside the
    weights, and beside what all layers' caches hold at its end."""

    layers: tuple[LayerCache, ...] = field(repr=False)
    prefill_bytes: int
    decode_bytes: int

    def cache_bytes(self, num_steps: int) -> int:
        """Of all layers, after the prompt and so many tokens more."""
        return sum(layer.bytes_after(num_steps) for layer in self.layers)

    def widest_growth_bytes(self, num_steps: int) -> int:
        """By how much the widest layer outgrows the traced step: a growing layer is copied when a token is appended."""
        return max((layer.bytes_after(num_steps) - layer.bytes_after(1) for layer in self.layers), default=0)


def trace_native_serving(model: Model, *, batch_size: int, prompt_tokens: int) -> NativeServing:
    """Trace a prompt, whole, and one token more, as `generate` runs them.

    Raises UnsupportedModelError naming the architecture where its code can't run without values.
    """
    try:
        with quiet_transformers():
            return _trace(model, batch_size, prompt_tokens)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a modelling file trips over without values
        reason = " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__
        raise UnsupportedModelError(
            f"what {model.name} ({model.model_type}) keeps of a context is unknown: its code does not run without values "
            f"({type(error).__name__}: {reason})."
        ) from error


def _trace(model: Model, batch_size: int, prompt_tokens: int) -> NativeServing:
    from transformers import DynamicCache

    skeleton: Any = build_skeleton(model.config, model.name)
    to_loaded_dtype(skeleton, torch_dtype(model.dtype))
    skeleton.eval()
    if skeleton.config.is_encoder_decoder:
        return _trace_encoder_decoder(skeleton, batch_size, prompt_tokens)
    config = skeleton.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    if len(cache.layers) != model.num_layers:
        raise UnsupportedModelError(
            f"what {model.name} ({model.model_type}) keeps of a context is unknown: transformers' cache has "
            f"{len(cache.layers)} layers for its {model.num_layers}."
        )
    kinds = _kinds(model)
    stands_for = {layer: same[-1] for layer, same in kinds.items()}
    skip_layers_but(skeleton, model, {layer for same in kinds.values() for layer in same})
    argument = "cache_params" if "cache_params" in inspect.signature(skeleton.forward).parameters else "past_key_values"
    held: list[list[int]] = []
    rises: list[int] = []
    with torch.no_grad(), TrueValues(), LiveBytes() as live:
        live.leave_out([*skeleton.parameters(), *skeleton.buffers()])
        for num_tokens in (prompt_tokens, 1):
            ids = torch.zeros(batch_size, num_tokens, dtype=torch.int64, device="meta")
            live.peak_bytes = live.live_bytes
            skeleton(input_ids=ids, use_cache=True, logits_to_keep=1, **{argument: cache})
            held.append([sum(t.nbytes for t in _tensors(vars(layer))) for layer in cache.layers])
            rises.append(live.peak_bytes - sum(held[-1]))
    layers = []
    for layer in range(model.num_layers):
        prompt, after = (rows[stands_for[layer]] for rows in held)
        window = getattr(cache.layers[layer], "sliding_window", None)
        step = after - prompt
        layers.append(LayerCache(prompt, step, _limit(prompt, step, prompt_tokens, window)))
    if not any(layer.prompt_bytes for layer in layers):
        raise UnsupportedModelError(
            f"what {model.name} ({model.model_type}) keeps of a context is unknown: it leaves transformers' cache empty."
        )
    return NativeServing(tuple(layers), rises[0], rises[1])


def _trace_encoder_decoder(skeleton: Any, batch_size: int, prompt_tokens: int) -> NativeServing:
    """The encoder reads the prompt; its last hidden states, and every decoder layer's keys and values of them, stay."""
    from transformers import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())  # as many layers as the decoder has
    held: list[list[int]] = []
    rises: list[int] = []
    with torch.no_grad(), TrueValues(), LiveBytes() as live:
        live.leave_out([*skeleton.parameters(), *skeleton.buffers()])
        ids = torch.zeros(batch_size, prompt_tokens, dtype=torch.int64, device="meta")
        states = skeleton.get_encoder()(input_ids=ids)
        own = states[0].nbytes
        for _ in range(2):
            one = torch.zeros(batch_size, 1, dtype=torch.int64, device="meta")
            skeleton(decoder_input_ids=one, encoder_outputs=states, past_key_values=cache, use_cache=True)
            halves = (cache.self_attention_cache, cache.cross_attention_cache)
            held.append(
                [own, *(sum(t.nbytes for t in _tensors(vars(layer))) for half in halves for layer in half.layers)]
            )
            rises.append(live.peak_bytes - sum(held[-1]))
            live.peak_bytes = live.live_bytes
    layers = tuple(LayerCache(first, second - first, None) for first, second in zip(*held, strict=True))
    return NativeServing(layers, rises[0], rises[1])


def _limit(prompt_bytes: int, step_bytes: int, prompt_tokens: int, window: int | None) -> int | None:
    """What a sliding layer holds at most: the window less the token that asks; beside what it keeps whatever the length."""
    if window is None:
        return None
    return prompt_bytes + max(0, window - 1 - prompt_tokens) * step_bytes


def _kinds(model: Model) -> dict[int, tuple[int, ...]]:
    """For each layer those of its kind that run; all run where layers read others' keys and values."""
    if any(site.shares_with is not None for site in model.attention):
        return {layer: (layer,) for layer in range(model.num_layers)}
    return layer_kinds(model)


def _tensors(values: Mapping[Any, Any]) -> Iterator[torch.Tensor]:
    """Tensors among a cache layer's attributes, and in dictionaries and lists there."""
    for value in values.values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value)
        elif isinstance(value, (list, tuple)):
            yield from _tensors(dict(enumerate(value)))
