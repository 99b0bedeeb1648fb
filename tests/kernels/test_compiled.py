"""Every scheme, on this CPU and on the same CPU with its better instructions switched off, against float64."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from packed_cases import error_of, make_case, make_input, make_table_case

from allocations import peak_bytes
from haversack.kernels import compiled, generic, ir_dequantize, ir_matmul, llvm, registry
from haversack.kernels.dot_schemes import SCHEMES, VectorsF32
from haversack.kernels.format import PackedFormat

HOST = llvm.host_target()
SHORT_OF_AVX512 = HOST.without(
    *[f[1:] for f in HOST.features.split(",") if f.startswith("+avx512") or f[1:] in ("evex512", "gfni", "vaes")]
)
SSE = SHORT_OF_AVX512.without(
    *[f[1:] for f in HOST.features.split(",") if f.startswith("+avx") or f[1:] in ("fma", "f16c", "xop", "fma4")]
)
KERNELS = [
    *compiled.matvecs(HOST),
    *compiled.matvecs(SHORT_OF_AVX512),
    *compiled.matvecs(SSE),
    compiled.CompiledTiles(HOST),
]
# As compiled.py states them; the result's own rounding comes on top in bfloat16.
TOLERANCE = {torch.float32: 2**-16, torch.bfloat16: 2**-8}

formats = st.tuples(st.sampled_from([2, 3, 4, 8]), st.sampled_from([0, 16, 32, 64, 128, 256]), st.booleans())


def test_lesser_machines_are_named():
    names = [k.NAME for k in KERNELS]
    assert len({(k.NAME, k.target) for k in KERNELS}) == len(KERNELS)
    if HOST.has("avx512bf16"):
        assert names[:3] == ["llvm-avx512-bf16", "llvm-avx512-f32", "llvm-avx512-vnni"]
    if HOST.has("avx2"):
        assert {"llvm-vectors-f32-avx2", "llvm-vectors-f32-baseline"} <= set(names)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{k.NAME}-{len(k.target.features)}")
@given(
    formats,
    st.sampled_from([1, 2, 3, 7, 11]),
    st.integers(1, 70),
    st.integers(1, 700),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 3),
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_kernel_against_float64(kernel, fmt, num_tokens, out_features, in_features, dtype, num_threads):
    case = make_case(out_features, in_features, *fmt, seed=in_features)
    activation_bits = kernel.scheme.activation_bits if isinstance(kernel, compiled.CompiledMatvec) else 16
    assume(kernel.supports(case.fmt, num_tokens, dtype, activation_bits))
    x = make_input(num_tokens, in_features, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        y = kernel.matmul(x, case.codes, case.scales, case.zeros, case.fmt, activation_bits)
    finally:
        torch.set_num_threads(before)
    assert y.shape == (num_tokens, out_features) and y.dtype == dtype
    if activation_bits == 8:
        reference = generic.matmul(x.float(), case.codes, case.scales, case.zeros, case.fmt, 8)
        torch.testing.assert_close(y.float(), reference, rtol=2**-7, atol=2e-3 * float(reference.abs().max()) + 1e-6)
    else:
        assert error_of(y, x, case) < TOLERANCE[dtype]


tables = st.tuples(
    st.sampled_from([2, 3, 4]), st.sampled_from([0, 16, 32, 64, 128]), st.sampled_from(["f16", "e8m0"]), st.booleans()
)


@pytest.mark.parametrize(
    "kernel",
    [k for k in KERNELS if k.activation_bits == 16],
    ids=lambda k: f"{k.NAME}-{len(k.target.features)}",
)
@given(
    tables,
    st.sampled_from([1, 2, 3, 7]),
    st.integers(1, 40),
    st.integers(1, 700),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_tables_against_float64(kernel, fmt, num_tokens, out_features, in_features, dtype):
    case = make_table_case(out_features, in_features, *fmt, seed=in_features)
    assume(kernel.supports(case.fmt, num_tokens, dtype, 16))
    x = make_input(num_tokens, in_features, dtype)
    y = kernel.matmul(x, case.codes, case.scales, None, case.fmt, 16)
    assert error_of(y, x, case) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_table_has_a_compiled_kernel_that_holds_its_values(bits):
    """In bfloat16 where the values are exact there, else in float32; never with codes taken for integers."""
    if not HOST.has("avx512bf16"):
        pytest.skip("this CPU has no bfloat16 dot products")
    exact, other = (make_table_case(4, 256, bits, 32, "e8m0", e).fmt for e in (True, False))
    names = [registry.choose_kernel(f, 1, torch.bfloat16, 16).NAME for f in (exact, other)]
    assert names == ["llvm-avx512-bf16" if bits == 4 else "llvm-avx512-f32", "llvm-avx512-f32"]
    assert registry.choose_kernel(exact, 1, torch.bfloat16, 8).activation_bits == 16


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_scheme_reads_every_column_once(scheme, bits):
    """Each column of a chunk has a place in the activations, and no two columns share one."""
    planned = scheme(PackedFormat(bits, 128, 512, True), HOST)
    columns = [c for vector in planned.activation_columns for c in vector]
    assert sorted(columns) == list(range(planned.chunk_columns))


@pytest.mark.parametrize("group_size", [128, 0])
def test_int8_activations_are_rounded_as_stated(group_size):
    """The error against float activations is at most half a step of each group, weighted; and it is not zero."""
    case = make_case(20, 512, 4, group_size, False)
    x = make_input(1, 512)
    step = x.view(1, -1, group_size or 512).abs().amax(-1, keepdim=True) / 127
    bound = (step / 2).expand(1, -1, group_size or 512).reshape(1, 512).double() @ case.weight.abs().t()
    kernel = next((k for k in compiled.matvecs(HOST) if k.supports(case.fmt, 1, x.dtype, 8)), None)
    y = kernel.matmul(x, case.codes, case.scales, case.zeros, case.fmt, 8)
    error = (y.double() - x.double() @ case.weight.t()).abs()
    assert (error <= bound * 1.001 + 1e-5).all() and error.max() > 1e-4


def test_many_rows_over_many_threads_are_each_written_once():
    case = make_case(3000, 192, 2, 64, True)
    x = make_input(9, 192)
    kernel = compiled.CompiledMatvec(VectorsF32, HOST, 16)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 5):  # more than there are cores here
            torch.set_num_threads(threads)
            results.append(kernel.matmul(x, case.codes, case.scales, case.zeros, case.fmt, 16))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results) and error_of(results[0], x, case) < TOLERANCE[torch.float32]


def test_wide_matrices_take_more_rows_at_a_time():
    """Where a round's activations leave the first cache; 5 tokens are two rounds, 11 rows no whole block."""
    case = make_case(11, 13000, 4, 128, True)
    x = make_input(5, 13000, torch.bfloat16)
    for scheme in (s for s in SCHEMES if s.activation_bits == 16 and HOST.has(*s.features)):
        kernel = compiled.matvec(case.fmt, 5, torch.bfloat16, scheme, HOST)
        assert kernel.case.block_rows == 4
        assert error_of(kernel(x, case.codes, case.scales, case.zeros), x, case) < TOLERANCE[torch.bfloat16]


def test_special_values_stay_special():
    """NaN and infinity in the activations reach the result; they are not rounded to numbers."""
    case = make_case(4, 128, 4, 128, True)
    for dtype in TOLERANCE:
        x = make_input(2, 128, dtype)
        x[0, 5], x[1, 5] = float("nan"), float("inf")
        for kernel in compiled.matvecs(HOST):
            if kernel.scheme.activation_bits == 16:
                y = kernel.matmul(x, case.codes, case.scales, case.zeros, case.fmt, 16)
                assert y[0].isnan().all(), kernel.NAME
                assert not y[1].isfinite().any(), kernel.NAME


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_workspace_is_as_declared(dtype):
    case = make_case(2000, 1024, 4, 128, True)
    x = make_input(40, 1024, dtype)
    kernel = compiled.CompiledTiles(HOST)
    kernel.matmul(x, case.codes, case.scales, case.zeros, case.fmt, 16)
    peak = peak_bytes(lambda: kernel.matmul(x, case.codes, case.scales, case.zeros, case.fmt, 16))
    workspace = peak - 40 * 2000 * dtype.itemsize
    declared = kernel.workspace_bytes(case.fmt, 40, 2000, dtype, 16)
    assert 0.7 * declared <= workspace <= declared < 2000 * 1024 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matvec_workspace_is_as_declared(dtype):
    case = make_case(300, 700, 3, 64, False)
    for kernel in compiled.matvecs(HOST):
        x = make_input(3, 700, dtype)
        bits = kernel.scheme.activation_bits
        kernel.matmul(x, case.codes, case.scales, case.zeros, case.fmt, bits)
        peak = peak_bytes(lambda k=kernel, x=x, b=bits: k.matmul(x, case.codes, case.scales, case.zeros, case.fmt, b))
        workspace = peak - 3 * 300 * dtype.itemsize
        assert 0 < workspace <= kernel.workspace_bytes(case.fmt, 3, 300, dtype, bits), kernel.NAME


def test_odd_groups_have_no_compiled_kernel():
    case = make_case(3, 96, 4, 24, True)
    assert not ir_dequantize.supports(case.fmt)
    assert not any(ir_matmul.supports(case.fmt, scheme(case.fmt, HOST)) for scheme in SCHEMES)
