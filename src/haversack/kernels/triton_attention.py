"""Triton kernel of attention of one new token per sequence straight from a stored cache, for devices.

What `ir_attention.py` is for a CPU, over the same slabs and counts: packed groups (`kv-tokens-v1`), sinks, the ring, and the
new token. One program takes one sequence's KV head with all query rows that share it and one part of its context
(Dao et al. 2023, "Flash-Decoding"), and leaves a maximum, a sum and an output per row; torch puts the parts together.
Importing this file needs triton. No time was measured yet.

Error against float64 over the stored values: 2^-16 of the largest |value| per output, from float32 sums, then one rounding to
the result's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl

from haversack.errors import UsageError
from haversack.kernels.attention import NO_LIMIT, CacheForm
from haversack.kernels.ir_attention_case import TENSORS

NAME = "triton-attention"

BLOCK_TOKENS = 32
"""Stored tokens that a program reads at a time."""

PART_TOKENS, MOST_PARTS = 512, 32
"""Tokens that make another part of the context worth its own program, and how many parts there are at most."""


@triton.jit
def _row_of(base, rows, channels, there, DIM: tl.constexpr, BITS: tl.constexpr):
    """Codes, float32 `(tokens, channels)`: byte j of a row of n bytes holds channels j, n + j, 2 n + j ..."""
    BYTES: tl.constexpr = DIM * BITS // 8
    byte = tl.load(base + rows[:, None] * BYTES + (channels % BYTES)[None, :], mask=there, other=0).to(tl.int32)
    return ((byte >> ((channels // BYTES) * BITS)[None, :]) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _add(query, keys, values, there, largest, total, output, softcap, CAPPED: tl.constexpr):
    """Streaming softmax: a block of keys and values `(tokens, channels)`, of which some tokens are there."""
    scores = tl.sum(query[:, None, :] * keys[None, :, :], axis=2)  # (rows, tokens)
    if CAPPED:
        bounded = scores / softcap
        # tanh, from exponentials that can't overflow
        e = tl.exp(-2.0 * tl.abs(bounded))
        scores = softcap * tl.where(bounded < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    scores = tl.where(there[None, :], scores, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, axis=1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    kept, weights = tl.exp(largest - safe), tl.exp(scores - safe[:, None])
    total = total * kept + tl.sum(weights, axis=1)
    output = output * kept[:, None] + tl.sum(weights[:, :, None] * values[None, :, :], axis=1)
    return new, total, output


@triton.jit
def _attend(
    query, keys, values, new_keys, new_values, counts,
    key_codes, key_scales, key_zeros, value_codes, value_scales, value_zeros,
    maxima, sums, outputs,
    kv_heads, parts, slots, sink_tokens, ring_tokens, recent_tokens, num_groups, scaling, softcap,
    ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PADDED: tl.constexpr, TOKENS: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, SIZE: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    CAPPED: tl.constexpr, HAS_NEW: tl.constexpr,
):  # fmt: skip
    sequence, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slab = sequence * kv_heads + head
    rows, key_channels = tl.arange(0, ROWS_PADDED), tl.arange(0, KEY_PADDED)
    value_channels = tl.arange(0, VALUE_PADDED)
    key_there, value_there = key_channels < KEY_DIM, value_channels < VALUE_DIM
    place = (slab * ROWS + rows)[:, None] * KEY_DIM + key_channels[None, :]
    q = tl.load(query + place, mask=(rows < ROWS)[:, None] & key_there[None, :], other=0.0).to(tl.float32) * scaling

    count, until = tl.load(counts + 2 * sequence), tl.load(counts + 2 * sequence + 1)
    stored = count - sink_tokens  # ordinals below this have been stored, unless negative
    oldest = tl.maximum(stored - recent_tokens, 0)
    largest = tl.full((ROWS_PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS_PADDED,), tl.float32)
    output = tl.zeros((ROWS_PADDED, VALUE_PADDED), tl.float32)

    if KEY_BITS > 0:
        first = tl.maximum(oldest, until - num_groups * SIZE)
        length = tl.maximum(until - first, 0)
        end = first + length * (part + 1) // parts
        for start in range(first + length * part // parts, end, TOKENS):
            ordinals = start + tl.arange(0, TOKENS)
            there = ordinals < end
            group = slab * num_groups + (ordinals // SIZE) % num_groups
            token = group * SIZE + ordinals % SIZE
            seen = there[:, None] & key_there[None, :]
            k = _row_of(key_codes, token, key_channels, seen, KEY_DIM, KEY_BITS)
            per_channel = group[:, None] * KEY_DIM + key_channels[None, :]
            k = k * tl.load(key_scales + per_channel, mask=seen, other=0.0).to(tl.float32)
            k += tl.load(key_zeros + per_channel, mask=seen, other=0.0).to(tl.float32)
            seen = there[:, None] & value_there[None, :]
            v = _row_of(value_codes, token, value_channels, seen, VALUE_DIM, VALUE_BITS)
            per_token = token[:, None] * VALUE_GROUPS + (value_channels // SIZE)[None, :]
            v = v * tl.load(value_scales + per_token, mask=seen, other=0.0).to(tl.float32)
            v += tl.load(value_zeros + per_token, mask=seen, other=0.0).to(tl.float32)
            largest, total, output = _add(q, k, v, there, largest, total, output, softcap, CAPPED)
        oldest = tl.maximum(oldest, until)

    # The sinks, then what of the ring is seen.
    num_sinks = tl.minimum(sink_tokens, count)
    oldest = tl.maximum(oldest, stored - ring_tokens)
    length = num_sinks + tl.maximum(stored - oldest, 0)
    end = length * (part + 1) // parts
    for start in range(length * part // parts, end, TOKENS):
        at = start + tl.arange(0, TOKENS)
        there = at < end
        slot = tl.where(at < num_sinks, at, sink_tokens + (oldest + at - num_sinks) % ring_tokens)
        token = slab * slots + slot
        seen = there[:, None] & key_there[None, :]
        k = tl.load(keys + token[:, None] * KEY_DIM + key_channels[None, :], mask=seen, other=0.0).to(tl.float32)
        seen = there[:, None] & value_there[None, :]
        v = tl.load(values + token[:, None] * VALUE_DIM + value_channels[None, :], mask=seen, other=0.0).to(tl.float32)
        largest, total, output = _add(q, k, v, there, largest, total, output, softcap, CAPPED)

    if HAS_NEW:
        one = tl.arange(0, 1)
        there = one == part  # the first part's alone
        seen = there[:, None] & key_there[None, :]
        k = tl.load(new_keys + (slab + one)[:, None] * KEY_DIM + key_channels[None, :], mask=seen, other=0.0)
        seen = there[:, None] & value_there[None, :]
        v = tl.load(new_values + (slab + one)[:, None] * VALUE_DIM + value_channels[None, :], mask=seen, other=0.0)
        largest, total, output = _add(
            q, k.to(tl.float32), v.to(tl.float32), there, largest, total, output, softcap, CAPPED
        )

    row = ((slab * parts) + part) * ROWS + rows
    tl.store(maxima + row, largest, mask=rows < ROWS)
    tl.store(sums + row, total, mask=rows < ROWS)
    some = (rows < ROWS)[:, None] & value_there[None, :]
    tl.store(outputs + row[:, None] * VALUE_DIM + value_channels[None, :], output, mask=some)


class TritonAttention:
    """Attention to one layer's cache, called as `DecodeAttention` is: `tensors` are its slabs by name."""

    def __init__(
        self,
        form: CacheForm,
        tensors: Mapping[str, torch.Tensor],
        *,
        sink_tokens: int,
        ring_tokens: int,
        recent_tokens: int = NO_LIMIT,
        num_groups: int = 0,
        softcap: float | None = None,
    ):
        for name, tensor in tensors.items():
            if not tensor.is_contiguous():
                raise UsageError(f"{name} must be a contiguous slab")
        self.form, self.tensors, self.softcap = form, dict(tensors), softcap
        self.sink_tokens, self.ring_tokens = sink_tokens, max(1, ring_tokens)
        self.recent_tokens = min(recent_tokens, 2**30)  # differences stay within 32 bits
        self.num_groups = max(1, num_groups)

    def parts(self, most_tokens: int) -> int:
        """Parts of every head's context."""
        return max(1, min(MOST_PARTS, most_tokens // PART_TOKENS))

    def __call__(
        self,
        query: torch.Tensor,
        new_keys: torch.Tensor | None,
        new_values: torch.Tensor | None,
        counts: Sequence[int],
        packed_until: Sequence[int],
        *,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output `(batch, heads, 1, value_head_dim)` in the query's dtype and log-sum-exp `(batch, heads, 1)`, float32."""
        form, batch_size = self.form, query.shape[0]
        rows, parts = form.num_heads // form.num_kv_heads, self.parts(max(counts, default=0))
        leading = (batch_size, form.num_kv_heads, parts, rows)
        maxima, sums = (torch.empty(leading, device=query.device) for _ in range(2))
        outputs = torch.empty(*leading, form.value_head_dim, device=query.device)
        numbers = torch.tensor([*zip(counts, packed_until, strict=True)], dtype=torch.int32, device=query.device)
        keys, values = self.tensors["keys"], self.tensors["values"]
        packed = [self.tensors.get(name, keys) for name in TENSORS]
        query = query.detach().reshape(batch_size, form.num_heads, -1).contiguous()
        new = [query if t is None else t.detach().contiguous() for t in (new_keys, new_values)]
        _attend[(batch_size, form.num_kv_heads, parts)](
            query, keys, values, *new, numbers, *packed, maxima, sums, outputs,
            form.num_kv_heads, parts, keys.shape[2], self.sink_tokens, self.ring_tokens, self.recent_tokens,
            self.num_groups, scaling, self.softcap or 1.0,
            ROWS=rows, ROWS_PADDED=triton.next_power_of_2(rows),
            KEY_DIM=form.key_head_dim, KEY_PADDED=triton.next_power_of_2(form.key_head_dim),
            VALUE_DIM=form.value_head_dim, VALUE_PADDED=triton.next_power_of_2(form.value_head_dim),
            TOKENS=BLOCK_TOKENS, KEY_BITS=form.key_bits, VALUE_BITS=form.value_bits, SIZE=form.group_size,
            VALUE_GROUPS=-(-form.value_head_dim // form.group_size),
            CAPPED=self.softcap is not None, HAS_NEW=new_keys is not None,
        )  # fmt: skip
        return _together(query.dtype, maxima, sums, outputs, sinks)


def _together(
    dtype: torch.dtype, maxima: torch.Tensor, sums: torch.Tensor, outputs: torch.Tensor, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp from the parts `(batch, kv_heads, parts, rows)`; nothing seen is zero and minus infinity."""
    largest = maxima.amax(2)
    shares = torch.exp(maxima - largest.masked_fill(largest == float("-inf"), 0.0)[:, :, None])
    total = (sums * shares).sum(2).flatten(1)  # (batch, heads)
    output = (outputs * shares[..., None]).sum(2).flatten(1, 2)
    largest = largest.flatten(1)
    lse = torch.log(total) + largest
    if sinks is not None:  # logits that take a share of the softmax and have no value
        logits = sinks.detach().to(torch.float32)
        total = total + torch.exp(logits - largest.masked_fill(largest == float("-inf"), 0.0))
    output = torch.where(total[..., None] > 0, output / total[..., None], 0.0)
    return output[:, :, None].to(dtype), lse[..., None]
