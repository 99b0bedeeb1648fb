"""Panels of codes times int8 activations, against float64 and against one token's int8 kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_cases import make_case, make_input

from allocations import peak_bytes
from haversack.kernels import compiled, ir_int8, llvm, registry
from haversack.kernels.activations import rounded_activations
from haversack.kernels.format import PackedFormat
from haversack.kernels.int8_products import LEAST_TOKENS, MOST_TOKENS, CompiledInt8Products
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding

HOST = llvm.host_target()
KERNEL = CompiledInt8Products(HOST)
# Of sum |x| times half the grid's range: sums of groups in float32, and one rounding of the result.
TOLERANCE = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-10}

pytestmark = pytest.mark.skipif(not HOST.has(*ir_int8.FEATURES), reason="this CPU has no AVX-512 VNNI")

formats = st.tuples(st.sampled_from([2, 3, 4, 8]), st.sampled_from([0, 32, 64, 128, 256, 1024]), st.booleans())


def error_of(y: torch.Tensor, x: torch.Tensor, case) -> float:
    """Largest |y - rounded x W^T|, in parts of sum |x| times half the grid's range."""
    rounded = rounded_activations(x.float(), case.fmt).double()
    bound = rounded.abs() @ case.magnitude.t() + 1e-30
    return ((y.double() - rounded @ case.weight.t()).abs() / bound).max().item()


@given(
    formats,
    st.integers(1, 40),
    st.integers(1, 200),
    st.integers(1, 1500),
    st.sampled_from(list(TOLERANCE)),
    st.integers(1, 3),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_against_float64(fmt, num_tokens, out_features, in_features, dtype, num_threads):
    case = make_case(out_features, in_features, *fmt, seed=in_features)
    assert ir_int8.supports(case.fmt, HOST)
    x = make_input(num_tokens, in_features, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        y = KERNEL.matmul(x, case.codes, case.scales, case.zeros, case.fmt, 8)
    finally:
        torch.set_num_threads(before)
    assert y.shape == (num_tokens, out_features) and y.dtype == dtype
    assert error_of(y, x, case) < TOLERANCE[dtype]


@pytest.mark.parametrize("num_tokens", [ir_int8.SPAN_TOKENS + 1, MOST_TOKENS, 2 * MOST_TOKENS + 7])
def test_spans_and_pieces_of_many_tokens_are_one_product(num_tokens):
    case = make_case(130, 700, 4, 64, False)
    x = make_input(num_tokens, 700)
    y = KERNEL.matmul(x, case.codes, case.scales, case.zeros, case.fmt, 8)
    assert error_of(y, x, case) < TOLERANCE[torch.float32]
    alone = KERNEL.matmul(x[-3:].contiguous(), case.codes, case.scales, case.zeros, case.fmt, 8)
    assert torch.equal(y[-3:], alone)  # a token's result does not depend on its neighbours


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_tokens_kernel_computes_the_same(bits, symmetric):
    case = make_case(70, 640, bits, 128, symmetric)
    x = make_input(5, 640)
    one = next(k for k in compiled.matvecs(HOST) if k.activation_bits == 8)
    expected = one.matmul(x, case.codes, case.scales, case.zeros, case.fmt, 8)
    y = KERNEL.matmul(x, case.codes, case.scales, case.zeros, case.fmt, 8)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_extreme_integers_do_not_overflow():
    """A row of the largest codes, against activations that all round to 127, at the most columns."""
    columns = ir_int8.MOST_COLUMNS
    fmt = PackedFormat(8, 0, columns, False)
    codes = torch.full((1, fmt.row_bytes), 255, dtype=torch.uint8)
    scales, zeros = torch.ones(1, 1, dtype=torch.float16), torch.zeros(1, 1, dtype=torch.uint8)
    y = KERNEL.matmul(torch.full((2, columns), 127.0), codes, scales, zeros, fmt, 8)
    torch.testing.assert_close(y, torch.full((2, 1), 255.0 * 127 * columns), rtol=1e-6, atol=0)


def test_zero_and_tiny_activations():
    case = make_case(20, 256, 4, 128, False)
    x = torch.zeros(3, 256)
    x[1, :128] = 1e-38  # its reciprocal overflows
    x[2, 200] = 5.0
    y = KERNEL.matmul(x, case.codes, case.scales, case.zeros, case.fmt, 8)
    assert (y[:2] == 0).all()
    torch.testing.assert_close(y[2].double(), 5 * case.weight[:, 200], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("num_tokens", [20, MOST_TOKENS + 40])
def test_workspace_is_as_declared(dtype, num_tokens):
    """The allocator's own report; whatever the number of tokens, less than a matrix of weights in bfloat16."""
    case = make_case(2000, 1024, 3, 64, False)
    x = make_input(num_tokens, 1024, dtype)

    given = (x, case.codes, case.scales, case.zeros, case.fmt, 8)
    KERNEL.matmul(*given)
    peak = peak_bytes(lambda: KERNEL.matmul(*given))
    workspace = peak - num_tokens * 2000 * dtype.itemsize
    declared = KERNEL.workspace_bytes(case.fmt, num_tokens, 2000, dtype, 8)
    assert 0.95 * declared <= workspace <= declared
    if dtype != torch.float16:
        assert declared < 2000 * 1024 * 2


def test_the_registry_prefers_it_for_many_tokens_by_8_bits():
    fmt = PackedFormat(4, 128, 4096, True)
    assert registry.choose_kernel(fmt, 512, torch.bfloat16, 8).NAME == KERNEL.NAME
    assert registry.choose_kernel(fmt, LEAST_TOKENS, torch.bfloat16, 8).NAME == KERNEL.NAME
    assert registry.choose_kernel(fmt, LEAST_TOKENS - 1, torch.bfloat16, 8).NAME == "llvm-avx512-vnni"
    assert registry.choose_kernel(fmt, 512, torch.bfloat16, 16).activation_bits == 16
    packed = WeightOption(grid=IntegerGrid(4, 128, activation_bits=8), rounding=NearestRounding())
    assert packed.kernel_name(512, 4096, 4096, "BF16") == KERNEL.NAME
    assert packed.workspace_bytes(512, 4096, 4096, "BF16") == KERNEL.workspace_bytes(fmt, 512, 4096, torch.bfloat16, 8)


def test_what_it_does_not_support_says_so():
    table = PackedFormat(4, 64, 256, True, tuple(float(i) for i in range(16)))
    for fmt in (table, PackedFormat(4, 24, 256, True), PackedFormat(4, 96, 960, True)):
        assert not KERNEL.supports(fmt, 512, torch.float32, 8)
    fmt = PackedFormat(4, 128, 256, True)
    assert not KERNEL.supports(fmt, 512, torch.float32, 16)
    assert not CompiledInt8Products(HOST.without("avx512vnni")).supports(fmt, 512, torch.float32, 8)
