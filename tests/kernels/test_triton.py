"""Triton's kernels against float64: on a GPU where there is one, else in triton's interpreter on this CPU."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_cases import error_of, make_case, make_input, make_table_case
from test_attention import TOLERANCE as ATTENTION_TOLERANCE
from test_attention import Cache, reference

from haversack.kernels.registry import choose_kernel, has_triton, kernels

if not has_triton():
    pytest.skip("triton is not installed: make test-triton installs it and runs these", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined, which is when they are imported

from haversack.kernels.attention import NO_LIMIT, CacheForm  # noqa: E402
from haversack.kernels.triton_attention import TritonAttention  # noqa: E402
from haversack.kernels.triton_matmul import FEW_TOKENS, TritonKernel  # noqa: E402

# As triton_matmul.py states them; in 16 bits the result's own rounding comes on top, and the tile's weights'.
TOLERANCE = {torch.float32: 2**-18, torch.bfloat16: 2**-7, torch.float16: 2**-10}

formats = st.tuples(st.sampled_from([2, 3, 4, 8]), st.sampled_from([0, 16, 24, 64, 128]), st.booleans())
tables = st.tuples(
    st.sampled_from([2, 3, 4]), st.sampled_from([0, 16, 64]), st.sampled_from(["f16", "e8m0"]), st.booleans()
)


def product(kernel, case, x, activation_bits=16):
    given_ = [t if t is None else t.to(DEVICE) for t in (x, case.codes, case.scales, case.zeros)]
    return kernel.matmul(*given_, case.fmt, activation_bits).cpu()


def test_they_come_first_on_devices_alone():
    assert [k.NAME for k in kernels("cuda")] == ["triton-sums", "triton-tiles", "generic-f32-tiles"]
    fmt = make_case(3, 64, 4, 24, True).fmt
    names = [choose_kernel(fmt, n, torch.bfloat16, 16, "cuda").NAME for n in (1, FEW_TOKENS, FEW_TOKENS + 1)]
    assert names == ["triton-sums", "triton-sums", "triton-tiles"]
    assert not any("triton" in k.NAME for k in kernels("cpu"))


@pytest.mark.parametrize("tiles", [False, True])
@given(formats, st.sampled_from([1, 3, 17]), st.integers(1, 40), st.integers(1, 300), st.sampled_from([*TOLERANCE]))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_integers_against_float64(tiles, fmt, num_tokens, out_features, in_features, dtype):
    case = make_case(out_features, in_features, *fmt, seed=in_features)
    x = make_input(num_tokens, in_features, dtype)
    y = product(TritonKernel(tiles), case, x)
    assert y.shape == (num_tokens, out_features) and y.dtype == dtype
    assert error_of(y, x, case) < TOLERANCE[dtype]


@pytest.mark.parametrize("tiles", [False, True])
@given(tables, st.sampled_from([1, 17]), st.integers(1, 40), st.integers(1, 300))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_tables_against_float64(tiles, fmt, num_tokens, out_features, in_features):
    case = make_table_case(out_features, in_features, *fmt, seed=in_features)
    x = make_input(num_tokens, in_features)
    assert error_of(product(TritonKernel(tiles), case, x), x, case) < TOLERANCE[torch.float32]


def test_rounded_activations_are_those_of_the_other_kernels():
    from haversack.kernels import generic

    case = make_case(20, 200, 4, 64, False)
    x = make_input(2, 200)
    expected = generic.matmul(x, case.codes, case.scales, case.zeros, case.fmt, 8)
    torch.testing.assert_close(product(TritonKernel(False), case, x, 8), expected, rtol=1e-5, atol=1e-4)


@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (6, 2), (13, 1)]),
    dims=st.sampled_from([(64, 64), (64, 128), (80, 80), (16, 48)]),
    bits=st.sampled_from([(0, 0), (8, 8), (4, 4), (4, 2), (2, 8)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    sinks=st.sampled_from([0, 3, 70]),
    dropping=st.booleans(),
    capped=st.booleans(),
)
@settings(max_examples=6, deadline=None, derandomize=True)
def test_attention_against_float64(seed, batch, heads, dims, bits, dtype, sinks, dropping, capped):
    """The cases of the CPU's kernel, with contexts of up to four parts."""
    size = 32
    form = CacheForm(*heads, *dims, dtype, *bits, size)
    generator = torch.Generator().manual_seed(seed)
    counts = [int(n) for n in torch.randint(0, 200, (batch,), generator=generator)]
    recent = 70 if dropping else NO_LIMIT
    ring = 2 * size if form.key_bits else (recent if dropping else 200)
    num_groups = (4 if dropping else 7) if form.key_bits else 0
    cache = Cache(generator, form, batch, counts, sinks, ring, recent, num_groups)
    on_device = {name: tensor.to(DEVICE) for name, tensor in cache.tensors.items()}
    settings_ = {"sink_tokens": sinks, "ring_tokens": ring, "recent_tokens": recent, "num_groups": num_groups}
    layer = TritonAttention(form, on_device, **settings_, softcap=7.0 if capped else None)
    layer.parts = lambda most_tokens: 1 + most_tokens // 50
    logits = torch.randn(heads[0], generator=generator) if capped else None
    query = torch.randn(batch, heads[0], 1, dims[0], generator=generator).to(dtype)
    moved = [None if t is None else t.to(DEVICE) for t in (query, *cache.new, logits)]
    out, lse = layer(*moved[:3], counts, cache.packed_until, scaling=0.2, sinks=moved[3])
    assert out.shape == (batch, heads[0], 1, dims[1]) and out.dtype == dtype
    for row, (keys, values) in enumerate(cache.seen):
        expected, expected_lse = reference(query[row, :, 0], keys, values, 0.2, 7.0 if capped else None, logits)
        bound = max(2**-16, ATTENTION_TOLERANCE[dtype]) * values.abs().max()
        assert (out[row, :, 0].cpu().double() - expected).abs().max() <= bound
        torch.testing.assert_close(lse[row, :, 0].cpu().double(), expected_lse, rtol=2**-17, atol=2**-15)


def test_attention_without_stored_tokens():
    """Nothing seen at all is zero and minus infinity; a first token is its own value."""
    slab = torch.full((1, 2, 5, 16), float("nan"), device=DEVICE)
    form = CacheForm(4, 2, 16, 16, torch.float32)
    layer = TritonAttention(form, {"keys": slab, "values": slab}, sink_tokens=0, ring_tokens=5)
    query, new = torch.randn(1, 4, 1, 16, device=DEVICE), torch.randn(1, 2, 1, 16, device=DEVICE)
    out, lse = layer(query, None, None, [0], [0], scaling=1.0)
    assert torch.equal(out, torch.zeros_like(out)) and bool(torch.isneginf(lse).all())
    out, _ = layer(query, new, new, [0], [0], scaling=1.0)
    torch.testing.assert_close(out, new.repeat_interleave(2, 1))
