"""The attention function and mask function that transformers finds under the name `haversack`.

A planned cache hands its layer over on the new keys themselves: `update()` returns only the new tokens' keys and
values, with a `Handover` as an attribute of the keys; the attention function attends to the layer and to them, then
appends them. Keys without a layer (no cache, or one of transformers' own) are attended to as they come, by the same
blockwise function, so that cached and uncached runs of the same chunks agree to the bit.

The mask function passes on which tokens are padding, and nothing else: causality and windows are decided from
positions. Registering happens on import, and again is harmless.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, prepare_padding_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from haversack.errors import UnsupportedModelError
from haversack.kernels.attention import CacheForm, decode_attention
from haversack.parts.kv.attention import as_block, attend_blocks, key_block_tokens, sees_causally
from haversack.parts.kv.base import KEY_BLOCK_TOKENS_PREFILL, Attending, KVLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from haversack.parts.kv.attention import Block

NAME = "haversack"
_ATTRIBUTE = "_haversack_handover"


@dataclass(eq=False)
class Handover:
    """A cache layer on its way from `update()` to the attention function; `taken` once it has arrived. With `peek` nothing will be stored."""

    store: KVLayer
    peek: bool = False
    taken: bool = False

    def attach(self, keys: torch.Tensor) -> None:
        setattr(keys, _ATTRIBUTE, self)


def register() -> None:
    """Make `attn_implementation="haversack"` known to transformers: the attention and, with it, the mask."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, haversack_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, haversack_mask)


@contextmanager
def registered(model: PreTrainedModel, name: str, attention: Any) -> Iterator[None]:
    """The model attends by `attention`, with our mask function, and as before afterwards: for looking at what passes."""
    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, haversack_mask)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)


def haversack_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **unused: Any,
) -> torch.Tensor | None:
    """Which of the `kv_length` tokens from `kv_offset` on are real, `(batch, kv_length)`; None where all are.

    Raises UnsupportedModelError for patterns beyond causal attention and a sliding window.
    """
    chunked = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
    if not allow_is_causal_skip or chunked:
        kind = getattr(config, "model_type", "this model")
        raise UnsupportedModelError(
            f"{kind} asks for an attention pattern beyond causal and sliding windows (packed sequences, bidirectional "
            f"blocks or chunks), which the haversack attention function does not have; load it with "
            f'attn_implementation="sdpa" and plan no KV cache.'
        )
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        return None
    padding = padding[:, kv_offset : kv_offset + kv_length]
    return None if bool(padding.all()) else padding


def haversack_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` `(batch, heads, q_tokens, head_dim)`; returns `(batch, q_tokens, heads, head_dim)`, None."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    problem = None
    if not causal:
        problem = "is not causal"
    elif position_bias is not None:
        problem = "adds a position bias"
    elif dropout:
        problem = "drops attention weights out"
    elif attention_mask is not None and attention_mask.ndim != 2:
        problem = f"comes with a prepared mask of shape {tuple(attention_mask.shape)}"
    if problem is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} {problem}, which the haversack attention function does not have; "
            f'load the model with attn_implementation="sdpa" and plan no KV cache.'
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    num_new = query.shape[2]
    handover: Handover | None = key.__dict__.pop(_ATTRIBUTE, None)
    if handover is None:
        output, _ = _attend_plain(query, key, value, attention_mask, scaling, sliding_window, softcap, s_aux)
        return output.transpose(1, 2).contiguous(), None
    handover.taken = True
    layer = handover.store
    if layer.site.window_tokens != sliding_window:
        raise UnsupportedModelError(
            f"{layer.site.id} was planned with a window of {layer.site.window_tokens} tokens, but {type(module).__name__} "
            f"attends with a window of {sliding_window}; describe the model again."
        )
    real = None if attention_mask is None else attention_mask[:, -num_new:]
    if real is not None and bool(real.all()):
        real = None
    act = layer.peek if handover.peek else layer.step
    output, _ = act(query, key, value, scaling=scaling, softcap=softcap, sinks=s_aux, real=real)
    return output.transpose(1, 2).contiguous(), None


def _attend_plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    real: torch.Tensor | None,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to keys of which the last are the queries' own; the same blocks as a planned layer makes."""
    if query.shape[2] == 1 and real is None and not (torch.is_grad_enabled() and query.requires_grad):
        found = _attend_compiled(query, key, value, scaling, window, softcap, sinks)
        if found is not None:
            return found
    num_queries, num_past = query.shape[2], key.shape[2] - query.shape[2]
    own = (key[:, :, num_past:], value[:, :, num_past:])
    how = Attending(scaling, softcap, sinks, real)
    new = own if sees_causally(query, *own, how=how, window_tokens=window) else None
    columns = torch.arange(key.shape[2], device=key.device)

    def blocks(start: int, stop: int) -> Iterator[Block]:
        size = key_block_tokens(num_queries)
        end = num_past + stop if new is None else num_past
        edges = [*range(0, num_past, size), *range(num_past, end, min(size, KEY_BLOCK_TOKENS_PREFILL))]
        queries = columns[num_past + start : num_past + stop, None]
        for first, last in zip(edges, [*edges[1:], end]):
            tokens = columns[first:last]
            hidden = None
            if last > num_past or real is not None or window is not None:
                hidden = tokens > queries
                if window is not None:
                    hidden |= tokens <= queries - window
                hidden = hidden[None, None]
                if real is not None:
                    hidden = hidden | ~real[:, None, None, first:last]
            yield as_block(key[:, :, first:last]), as_block(value[:, :, first:last]), hidden
            del hidden

    return attend_blocks(
        query,
        blocks if new is None or num_past else None,
        num_kv_heads=key.shape[1],
        value_head_dim=value.shape[-1],
        scaling=scaling,
        softcap=softcap,
        sinks=sinks,
        new=new,
    )


def _attend_compiled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """One query per sequence by the kernel that a planned layer uses; None where there is none."""
    heads = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
    form = CacheForm(*heads, query.dtype)
    if not form.is_supported(key.device.type) or key.dtype != query.dtype:
        return None
    slabs = {"keys": key.contiguous(), "values": value.contiguous()}
    past = key.shape[2] - 1
    seen = past if window is None else min(past, window - 1)
    layer = decode_attention(form, slabs, sink_tokens=0, ring_tokens=past, recent_tokens=seen, softcap=softcap)
    new_keys, new_values = (slabs[name][:, :, past:] for name in ("keys", "values"))
    rows = query.shape[0]
    return layer(query, new_keys, new_values, [past] * rows, [0] * rows, scaling=scaling, sinks=sinks)


register()
