"""Attention from stored keys and values against float64 softmax over the values they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haversack.errors import UsageError
from haversack.kernels.attention import attend_packed, attend_plain, can_attend_packed, can_attend_plain


def _reference(query, keys, values, scaling, softcap):
    """Output and log-sum-exp in float64; heads of a group share their keys."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (t.double().repeat_interleave(groups, dim=1) for t in (keys, values))
    scores = query.double() @ keys.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def _check(found, expected, values):
    out, lse = found
    assert (out.double() - expected[0]).abs().max() < 2**-18 * values.abs().max()
    torch.testing.assert_close(lse.double(), expected[1], rtol=2**-20, atol=2**-18)


shapes = st.tuples(st.integers(1, 2), st.integers(1, 2), st.sampled_from([1, 3, 4]), st.sampled_from([1, 3]))


@given(shapes, st.integers(1, 200), st.sampled_from([16, 64, 80]), st.sampled_from([None, 30.0]), st.integers(0, 2))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_plain_against_float64(shape, num_tokens, head_dim, softcap, which):
    dtype = [torch.float32, torch.bfloat16, torch.float16][which]
    batch, kv_heads, groups, queries = shape
    generator = torch.Generator().manual_seed(num_tokens)
    query = torch.randn(batch, kv_heads * groups, queries, head_dim, generator=generator)
    keys, values = (torch.randn(batch, kv_heads, 200, head_dim, generator=generator).to(dtype) for _ in range(2))
    keys[:, :, num_tokens:], values[:, :, num_tokens:] = float("nan"), float("nan")  # slots that hold no token
    assert can_attend_plain(head_dim, head_dim, dtype)
    found = attend_plain(query, keys, values, num_tokens=num_tokens, scaling=0.3, softcap=softcap)
    seen = keys[:, :, :num_tokens], values[:, :, :num_tokens]
    _check(found, _reference(query, *seen, 0.3, softcap), seen[1])


@given(
    shapes,
    st.integers(1, 3),
    st.sampled_from([(64, 64), (128, 64), (64, 128)]),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([32, 64]),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_packed_against_float64(shape, num_groups, head_dims, key_bits, value_bits, group_size):
    batch, kv_heads, groups, queries = shape
    key_dim, value_dim = head_dims
    generator = torch.Generator().manual_seed(num_groups)
    tokens = num_groups * group_size

    def codes(dim, bits):
        return torch.randint(0, 1 << bits, (batch, kv_heads, tokens, dim), generator=generator, dtype=torch.uint8)

    def packed(code, bits):
        """By the words of layout `kv-tokens-v1`: byte j holds channels j, n + j, 2n + j ... from the low bits up."""
        planes = code.unflatten(-1, (8 // bits, -1)).long()
        return (planes << (bits * torch.arange(8 // bits))[:, None]).sum(-2).to(torch.uint8)

    def half(*size):
        return torch.rand(size, generator=generator).sub(0.3).half()

    query = torch.randn(batch, kv_heads * groups, queries, key_dim, generator=generator)
    key_codes, value_codes = codes(key_dim, key_bits), codes(value_dim, value_bits)
    key_scales, key_zeros = (half(batch, kv_heads, num_groups, key_dim) / 2**key_bits for _ in range(2))
    channel_groups = -(-value_dim // group_size)
    value_scales, value_zeros = (half(batch, kv_heads, tokens, channel_groups) for _ in range(2))
    keys = key_codes.double() * key_scales.double().repeat_interleave(group_size, 2)
    keys += key_zeros.double().repeat_interleave(group_size, 2)
    values = value_codes.double() * value_scales.double().repeat_interleave(group_size, 3)[..., :value_dim]
    values += value_zeros.double().repeat_interleave(group_size, 3)[..., :value_dim]
    assert can_attend_packed(key_dim, value_dim, key_bits, value_bits) == (key_bits > 2 or key_dim % 64 == 0)
    found = attend_packed(
        query,
        packed(key_codes, key_bits),
        key_scales,
        key_zeros,
        packed(value_codes, value_bits),
        value_scales,
        value_zeros,
        num_tokens=tokens,
        key_bits=key_bits,
        value_bits=value_bits,
        group_size=group_size,
        scaling=0.1,
    )
    _check(found, _reference(query, keys, values, 0.1, None), values)


def test_pieces_combine_by_their_log_sum_exp():
    query, keys, values = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 150, 64), torch.randn(1, 2, 150, 64)
    whole, lse = attend_plain(query, keys, values, num_tokens=150, scaling=0.125)
    first, first_lse = attend_plain(query, keys, values, num_tokens=70, scaling=0.125)
    last, last_lse = attend_plain(
        query, keys[:, :, 70:].contiguous(), values[:, :, 70:].contiguous(), num_tokens=80, scaling=0.125
    )
    share = torch.sigmoid(first_lse - last_lse)[..., None]
    torch.testing.assert_close(first * share + last * (1 - share), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.logaddexp(first_lse, last_lse), lse)


def test_extreme_scores_stay_finite():
    query, values = torch.full((1, 1, 1, 16), 100.0), torch.randn(1, 1, 3, 16)
    keys = torch.tensor([-1e3, 0.0, 1e3]).view(1, 1, 3, 1).expand(1, 1, 3, 16).contiguous()
    out, lse = attend_plain(query, keys, values, num_tokens=3, scaling=1.0)
    torch.testing.assert_close(out[0, 0, 0], values[0, 0, 2])
    assert lse.item() == pytest.approx(100.0 * 1e3 * 16)


def test_what_cannot_be_attended_is_said():
    assert not can_attend_plain(20, 20, torch.float32)
    assert not can_attend_packed(96, 96, 2, 2)
    assert not can_attend_packed(64, 64, 4, 4, "cuda")
    query, slab = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 5, 16)
    with pytest.raises(UsageError, match="6 tokens"):
        attend_plain(query, slab, slab, num_tokens=6, scaling=1.0)
    with pytest.raises(UsageError, match="contiguous"):
        attend_plain(query, torch.zeros(1, 1, 5, 32)[..., ::2], slab, num_tokens=1, scaling=1.0)
