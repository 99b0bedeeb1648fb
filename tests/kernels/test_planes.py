"""Bit planes against float64 and integers, on this CPU and on the same CPU with its better instructions switched off."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compiled import HOST, SHORT_OF_AVX512, SSE

from allocations import peak_bytes
from haversack.codecs.bitplanes import num_blocks, pack_planes
from haversack.errors import UsageError
from haversack.kernels.activations import rounded_activations
from haversack.kernels.format import PlaneFormat
from haversack.kernels.planes import CompiledPlanes, CompiledPlaneTiles, plane_kernels
from haversack.kernels.registry import choose_kernel

TARGETS = {"host": HOST, "short-of-avx512": SHORT_OF_AVX512, "sse": SSE}
# As planes.py states them; the result's own rounding comes on top in bfloat16, and the tile's.
TOLERANCE = {torch.float32: 2**-18, torch.bfloat16: 2**-8}

formats = st.tuples(st.integers(1, 8), st.sampled_from([32, 64, 128]), st.booleans())


def make_planes(out_features, fmt, seed=0, scales=None):
    """Random codes and scales: `(weight float64 (out, in), magnitude, packed codes, stored scales)`."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << fmt.bits, (out_features, fmt.padded_columns), generator=generator, dtype=torch.uint8)
    shape = (num_blocks(out_features), fmt.num_groups, fmt.scales_per_group, 16)
    stored = (2.0 ** (-6 + 4 * torch.rand(shape, generator=generator))).half() if scales is None else scales
    by_row = stored.double().permute(0, 3, 1, 2).reshape(-1, fmt.num_groups, 1, shape[2])[:out_features]
    by_row = by_row if fmt.bases else by_row * 2.0 ** torch.arange(fmt.bits)
    signs = torch.stack([(codes >> p & 1).double() * 2 - 1 for p in range(fmt.bits)], -1)
    weight = (signs.view(out_features, fmt.num_groups, -1, fmt.bits) * by_row).sum(-1)
    magnitude = by_row.sum(-1).expand(weight.shape)
    flat = (t.reshape(out_features, -1)[:, : fmt.in_features] for t in (weight, magnitude))
    return (*flat, pack_planes(codes, fmt.bits), stored)


@pytest.mark.parametrize("target", TARGETS)
@given(
    formats,
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from([*TOLERANCE]),
    st.integers(1, 3),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_planes_against_float64(target, form, num_tokens, out_features, in_features, dtype, num_threads):
    fmt = PlaneFormat(form[0], form[1], in_features, form[2])
    weight, magnitude, codes, scales = make_planes(out_features, fmt, in_features)
    x = torch.randn(num_tokens, in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)  # also more than there are cores here
    try:
        for kernel in plane_kernels(TARGETS[target]):
            bits = kernel.activation_bits
            y = kernel.matmul(x, codes, scales, out_features, fmt, bits)
            assert y.shape == (num_tokens, out_features) and y.dtype == dtype
            taken = (rounded_activations(x, fmt) if bits == 8 else x).double()
            bound = taken.abs() @ magnitude.t() + 1e-30
            # int8: a half of a step may be rounded either way.
            slack = 2**-9 if bits == 8 else TOLERANCE[dtype]
            slack += 2**-8 if dtype == torch.bfloat16 else 0
            assert ((y.double() - taken @ weight.t()).abs() / bound).max() < slack, kernel.NAME
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_counted_bits_are_exact_against_integers(target, bits):
    """Integer activations whose groups reach 127, so that they are their own rounding, and scales of 1."""
    fmt = PlaneFormat(bits, 64, 200)
    ones = torch.ones(3, fmt.num_groups, 1, 16).half()
    weight, _, codes, scales = make_planes(33, fmt, bits, ones)
    x = torch.randint(-127, 128, (2, 200), generator=torch.Generator().manual_seed(bits))
    x[:, ::64], x[1, 64] = 127, -127
    y = CompiledPlanes(TARGETS[target], 8).matmul(x.float(), codes, scales, 33, fmt, 8)
    assert torch.equal(y.double(), x.double() @ weight.t())
    assert weight.abs().max() == (1 << bits) - 1 and bool((weight % 2).abs().eq(1).all())


def test_kernels_are_named_by_what_they_do_and_the_cpu_has():
    fmt = PlaneFormat(2, 64, 128)
    if HOST.has("avx512f", "avx512vpopcntdq"):
        assert choose_kernel(fmt, 1, torch.float32, 16).NAME == "llvm-planes-tables-avx512f"
        assert choose_kernel(fmt, 1, torch.float32, 8).NAME == "llvm-planes-counts-vpopcntdq"
        assert choose_kernel(fmt, 500, torch.float32, 8).NAME == "llvm-plane-tiles-avx512f"
    assert CompiledPlanes(SHORT_OF_AVX512).NAME.startswith("llvm-planes-tables-avx2") or not HOST.has("avx2")
    assert CompiledPlanes(SSE).NAME == "llvm-planes-signs-baseline" or HOST.has("neon")
    with pytest.raises(UsageError, match="activation_bits"):
        choose_kernel(fmt, 1, torch.float32, 4)


def test_special_values_stay_special():
    fmt = PlaneFormat(2, 64, 128)
    _, _, codes, scales = make_planes(20, fmt)
    x = torch.randn(2, 128)
    x[0, 5], x[1, 5] = float("nan"), float("inf")
    for target in TARGETS.values():
        y = CompiledPlanes(target).matmul(x, codes, scales, 20, fmt, 16)
        assert y[0].isnan().all() and not y[1].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspace_is_as_declared_and_holds_no_whole_matrix(dtype):
    fmt, out_features = PlaneFormat(2, 128, 1024), 2000
    _, _, codes, scales = make_planes(out_features, fmt)
    for kernel, num_tokens in [(k, 40 if isinstance(k, CompiledPlaneTiles) else 2) for k in plane_kernels(HOST)]:
        x = torch.randn(num_tokens, 1024).to(dtype)
        given_ = (codes, scales, out_features, fmt, kernel.activation_bits)
        kernel.matmul(x, *given_)
        peak = peak_bytes(lambda k=kernel, x=x, g=given_: k.matmul(x, *g))
        workspace = peak - num_tokens * out_features * dtype.itemsize
        declared = kernel.workspace_bytes(fmt, num_tokens, out_features, dtype, kernel.activation_bits)
        assert 0.6 * declared <= workspace <= declared, kernel.NAME
        assert declared < out_features * 1024 * (4 if isinstance(kernel, CompiledPlaneTiles) else 0.5)


@pytest.mark.parametrize(
    ("given_", "words"),
    [((0, 64, 8), "1 to 8"), ((9, 64, 8), "1 to 8"), ((2, 48, 8), "32, 64, 128"), ((2, 64, 0), "at least one")],
)
def test_formats_that_there_are_none_of_are_refused(given_, words):
    with pytest.raises(UsageError, match=words):
        PlaneFormat(*given_)
