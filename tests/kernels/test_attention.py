"""Compiled attention of one token per sequence against float64 softmax over the values that the cache stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haversack.errors import UsageError
from haversack.kernels.attention import NO_LIMIT, CacheForm, DecodeAttention
from haversack.kernels.llvm import host_target
from haversack.kernels.registry import has_triton

TOLERANCE = {torch.float32: 2**-18, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of the largest |value|: float32 sums and exp, then one rounding to the result's dtype."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference(query, keys, values, scaling, softcap=None, logits=None):
    """Output and log-sum-exp in float64 of one sequence: query `(heads, dim)`, keys and values `(kv_heads, tokens, dim)`."""
    groups = query.shape[0] // keys.shape[0]
    keys, values = (t.double().repeat_interleave(groups, dim=0) for t in (keys, values))
    scores = (keys @ query.double()[..., None]).squeeze(-1) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    lse = scores.logsumexp(-1)
    if logits is not None:
        weights = torch.cat([scores, logits.double()[:, None]], -1).softmax(-1)[:, :-1]
    else:
        weights = scores.softmax(-1)
    return (weights[:, None] @ values).squeeze(1), lse


class Cache:
    """Slabs filled as the words of `RingLayer` say, and for each sequence the keys and values that are seen."""

    def __init__(self, generator, form, batch, counts, sinks, ring, recent, num_groups):
        self.form, self.batch = form, batch
        size = form.group_size
        self.tensors = {
            name: torch.full((batch, form.num_kv_heads, sinks + ring, dim), float("nan"), dtype=form.dtype)
            for name, dim in (("keys", form.key_head_dim), ("values", form.value_head_dim))
        }
        self.packed_until = [0] * batch
        plain = [
            torch.randn(batch, form.num_kv_heads, max(counts) + 1, dim, generator=generator).to(form.dtype)
            for dim in (form.key_head_dim, form.value_head_dim)
        ]
        seen_values = [t.double() for t in plain]
        if form.key_bits:
            self._pack(generator, num_groups)
        self.seen = []
        for row, count in enumerate(counts):
            stored = max(0, count - sinks)
            oldest = max(0, stored - recent)
            if form.key_bits:  # groups that have left the ring
                self.packed_until[row] = max(0, stored - ring // 2) // size * size
            for name, t in zip(("keys", "values"), plain):
                for position in range(min(sinks, count)):
                    self.tensors[name][row, :, position] = t[row, :, position]
                for ordinal in range(max(self.packed_until[row], stored - ring), stored):
                    self.tensors[name][row, :, sinks + ordinal % ring] = t[row, :, sinks + ordinal]
            if form.key_bits:
                for ordinal in range(max(0, self.packed_until[row] - num_groups * size), self.packed_until[row]):
                    slot = ordinal // size % num_groups * size + ordinal % size
                    for kind in range(2):
                        seen_values[kind][row, :, sinks + ordinal] = self.unpacked[kind][row, :, slot]
                oldest = max(oldest, self.packed_until[row] - num_groups * size)
            else:
                oldest = max(oldest, stored - ring)
            visible = [*range(min(sinks, count)), *range(sinks + oldest, count), count]
            self.seen.append(tuple(t[row, :, visible] for t in seen_values))
        self.new = [torch.stack([t[row, :, count] for row, count in enumerate(counts)])[:, :, None] for t in plain]

    def _pack(self, generator, num_groups):
        """Random codes, scales and zeros in layout `kv-tokens-v1`: byte j of a row holds channels j, n + j, 2n + j ..."""
        form, size = self.form, self.form.group_size
        leading, tokens = (self.batch, form.num_kv_heads), num_groups * size
        self.unpacked = []
        for kind, bits, dim in (
            ("key", form.key_bits, form.key_head_dim),
            ("value", form.value_bits, form.value_head_dim),
        ):
            code = torch.randint(0, 1 << bits, (*leading, tokens, dim), generator=generator, dtype=torch.uint8)
            planes = code.unflatten(-1, (8 // bits, -1)).long()
            packed = (planes << (bits * torch.arange(8 // bits))[:, None]).sum(-2).to(torch.uint8)
            shape = (num_groups, dim) if kind == "key" else (tokens, -(-dim // size))
            scales, zeros = (
                torch.rand(*leading, *shape, generator=generator).sub(0.3).half() / 2**bits for _ in range(2)
            )
            wide = [
                t.double().repeat_interleave(size, 2)
                if kind == "key"
                else t.double().repeat_interleave(size, 3)[..., :dim]
                for t in (scales, zeros)
            ]
            self.unpacked.append(code.double() * wide[0] + wide[1])
            self.tensors |= {f"{kind}_codes": packed, f"{kind}_scales": scales, f"{kind}_zeros": zeros}


@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (13, 1), (16, 1), (4, 4)]),
    dims=st.sampled_from([(64, 64), (128, 64), (64, 128), (80, 80), (16, 48), (32, 256)]),
    bits=st.sampled_from([(0, 0), (0, 0), (8, 8), (4, 4), (2, 2), (4, 2), (2, 8)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    sinks=st.sampled_from([0, 3, 70]),
    dropping=st.booleans(),
    capped=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_against_float64(seed, batch, heads, dims, bits, dtype, sinks, dropping, capped, threads):
    size = 32
    form = CacheForm(*heads, *dims, dtype, *bits, size)
    if not form.is_supported():
        assert bits != (0, 0) and (dims[0] % (128 // bits[0]) or dims[1] % (128 // bits[1]))
        return
    generator = torch.Generator().manual_seed(seed)
    counts = [int(n) for n in torch.randint(0, 400, (batch,), generator=generator)]
    recent = 150 if dropping else NO_LIMIT
    ring = 2 * size if form.key_bits else (recent if dropping else 400)
    num_groups = (6 if dropping else 13) if form.key_bits else 0
    cache = Cache(generator, form, batch, counts, sinks, ring, recent, num_groups)
    layer = DecodeAttention(
        form,
        cache.tensors,
        sink_tokens=sinks,
        ring_tokens=ring,
        recent_tokens=recent,
        num_groups=num_groups,
        softcap=7.0 if capped else None,
    )
    logits = torch.randn(heads[0], generator=generator) if capped else None
    query = torch.randn(batch, heads[0], 1, dims[0], generator=generator).to(dtype)
    torch.set_num_threads(threads)
    out, lse = layer(query, *cache.new, counts, cache.packed_until, scaling=0.2, sinks=logits)
    assert out.shape == (batch, heads[0], 1, dims[1]) and out.dtype == dtype
    for row, (keys, values) in enumerate(cache.seen):
        expected, expected_lse = reference(query[row, :, 0], keys, values, 0.2, 7.0 if capped else None, logits)
        assert (out[row, :, 0].double() - expected).abs().max() <= TOLERANCE[dtype] * values.abs().max()
        torch.testing.assert_close(lse[row, :, 0].double(), expected_lse, rtol=2**-19, atol=2**-17)


def plain_layer(keys, values, heads=None, target=None):
    form = CacheForm(heads or keys.shape[1], keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
    return DecodeAttention(
        form, {"keys": keys, "values": values}, sink_tokens=0, ring_tokens=keys.shape[2], target=target
    )


def test_lesser_instruction_sets_agree():
    """The same text for a CPU without AVX-512, bfloat16 or AVX at all."""
    query, keys, values = (torch.randn(2, h, n, 64).bfloat16() for h, n in ((8, 1), (2, 100), (2, 100)))
    whole, _ = plain_layer(keys, values, 8)(query, None, None, [100, 37], [0, 0], scaling=0.1)
    host = host_target()
    wide = [n[1:] for n in host.features.split(",") if n.startswith("+avx512")]
    for target in (host.without(*wide), host.without(*wide, "avx2", "fma", "avx", "f16c", "avxvnni")):
        found, _ = plain_layer(keys, values, 8, target)(query, None, None, [100, 37], [0, 0], scaling=0.1)
        torch.testing.assert_close(found.float(), whole.float(), rtol=2**-7, atol=2**-9)


def test_without_stored_tokens():
    """Nothing seen at all is zero and minus infinity; a first token is its own value."""
    layer = plain_layer(torch.full((1, 2, 5, 16), float("nan")), torch.full((1, 2, 5, 16), float("nan")), 4)
    query, new = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 16)
    out, lse = layer(query, None, None, [0], [0], scaling=1.0)
    assert torch.equal(out, torch.zeros_like(out)) and bool(torch.isneginf(lse).all())
    out, _ = layer(query, new, new, [0], [0], scaling=1.0)
    torch.testing.assert_close(out, new.repeat_interleave(2, 1))


def test_extreme_scores_stay_finite():
    query, values = torch.full((1, 1, 1, 16), 100.0), torch.randn(1, 1, 3, 16)
    keys = torch.tensor([-1e3, 0.0, 1e3]).view(1, 1, 3, 1).expand(1, 1, 3, 16).contiguous()
    out, lse = plain_layer(keys, values)(query, None, None, [3], [0], scaling=1.0)
    torch.testing.assert_close(out[0, 0, 0], values[0, 0, 2])
    assert lse.item() == pytest.approx(100.0 * 1e3 * 16)


def test_few_heads_are_split_along_the_context():
    assert CacheForm(32, 8, 64, 64, torch.bfloat16).splits(1, 2) == 1
    assert CacheForm(8, 1, 64, 64, torch.bfloat16).splits(1, 2) == 4
    assert CacheForm(8, 1, 64, 64, torch.bfloat16).splits(1, 1) == 1


def test_what_cannot_be_attended_is_said():
    assert not CacheForm(1, 1, 20, 20, torch.float32).is_supported()
    assert not CacheForm(1, 1, 96, 96, torch.float32, 2, 2).is_supported()
    assert CacheForm(1, 1, 64, 64, torch.float32, 4, 4).is_supported("cuda") == has_triton()
    assert not CacheForm(1, 1, 64, 64, torch.float32, 4, 4).is_supported("mps")
    assert not CacheForm(1, 1, 64, 64, torch.float64).is_supported()
    with pytest.raises(UsageError, match="contiguous"):
        plain_layer(torch.zeros(1, 1, 5, 32)[..., ::2], torch.zeros(1, 1, 5, 16))
