import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_cases import error_of, make_case, make_input, make_table_case
from torch._subclasses.fake_tensor import FakeTensorMode

from allocations import peak_bytes
from haversack.errors import UsageError
from haversack.kernels import generic, registry
from haversack.kernels.format import PackedFormat
from haversack.kernels.registry import kernel_name, packed_matmul, packed_rows, workspace_bytes

# One rounding of the result to its dtype, over the tolerance that the kernels state for float32.
RESULT_ROUNDING = {torch.float32: 2**-16, torch.bfloat16: 2**-8, torch.float16: 2**-10}

formats = st.tuples(st.sampled_from([2, 3, 4, 8]), st.sampled_from([0, 24, 64, 128]), st.booleans())


@given(formats, st.integers(0, 3), st.integers(1, 40), st.integers(1, 300), st.sampled_from([*RESULT_ROUNDING]))
@settings(max_examples=40, deadline=None)
def test_packed_matmul_against_float64(fmt, num_tokens, out_features, in_features, dtype):
    case = make_case(out_features, in_features, *fmt, seed=in_features)
    x = make_input(num_tokens, in_features, dtype)
    y = packed_matmul(x, case.codes, case.scales, case.zeros, **case.arguments)
    assert y.shape == (num_tokens, out_features) and y.dtype == dtype
    assert error_of(y, x, case) < RESULT_ROUNDING[dtype]


tables = st.tuples(
    st.sampled_from([2, 3, 4]), st.sampled_from([0, 16, 24, 32, 64]), st.sampled_from(["f16", "e8m0"]), st.booleans()
)


@given(tables, st.integers(1, 3), st.integers(1, 40), st.integers(1, 300), st.sampled_from([*RESULT_ROUNDING]))
@settings(max_examples=30, deadline=None)
def test_tables_against_float64(fmt, num_tokens, out_features, in_features, dtype):
    case = make_table_case(out_features, in_features, *fmt, seed=in_features)
    x = make_input(num_tokens, in_features, dtype)
    y = packed_matmul(x, case.codes, case.scales, **case.arguments)
    assert error_of(y, x, case) < RESULT_ROUNDING[dtype]
    rows = packed_rows(torch.arange(out_features), case.codes, case.scales, **case.arguments)
    torch.testing.assert_close(rows.double(), case.weight, rtol=2**-23, atol=0)


def test_generic_computes_tables():
    """The reference kernel, which the choice passes over."""
    case = make_table_case(50, 300, 3, 32, "e8m0", False)
    x = make_input(5, 300)
    assert error_of(generic.matmul(x, case.codes, case.scales, None, case.fmt, 16), x, case) < 2**-16


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"table": (1.0, 2.0)}, "2^bits finite values"),
        ({"table": (float("inf"),) * 16}, "2^bits finite values"),
        ({"table": (1.0,) * 16, "symmetric": False}, "no zero points"),
        ({"scales": "f8"}, "f16 or e8m0"),
    ],
)
def test_formats_that_mean_nothing_are_refused(given, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        PackedFormat(**{"bits": 4, "group_size": 64, "in_features": 128, "symmetric": True} | given)


@given(formats, st.integers(1, 40), st.integers(1, 300))
@settings(max_examples=20, deadline=None)
def test_packed_rows_are_the_values(fmt, out_features, in_features):
    case = make_case(out_features, in_features, *fmt)
    index = torch.randint(0, out_features, (2, 3))
    rows = packed_rows(index, case.codes, case.scales, case.zeros, **case.arguments)
    assert rows.shape == (2, 3, in_features) and rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), case.weight[index], rtol=2**-23, atol=0)


def test_leading_dimensions_and_empty_batches():
    case = make_case(5, 70, 4, 64, True)
    x = make_input(6, 70)
    y = packed_matmul(x, case.codes, case.scales, **case.arguments)
    assert torch.equal(packed_matmul(x.view(2, 3, 70), case.codes, case.scales, **case.arguments), y.view(2, 3, 5))
    assert packed_matmul(x[0], case.codes, case.scales, **case.arguments).shape == (5,)
    assert packed_matmul(x[:0], case.codes, case.scales, **case.arguments).shape == (0, 5)
    assert packed_rows(torch.tensor([], dtype=torch.int64), case.codes, case.scales, **case.arguments).shape == (0, 70)


def test_fake_tensors_touch_no_kernel():
    case = make_case(5, 70, 4, 64, False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, codes = mode.from_tensor(torch.empty(2, 3, 70, dtype=torch.bfloat16)), mode.from_tensor(case.codes)
        scales, zeros = mode.from_tensor(case.scales), mode.from_tensor(case.zeros)
        y = packed_matmul(x, codes, scales, zeros, **case.arguments)
        assert y.shape == (2, 3, 5) and y.dtype == torch.bfloat16
        index = mode.from_tensor(torch.zeros(4, dtype=torch.int64))
        assert packed_rows(index, codes, scales, zeros, **case.arguments).shape == (4, 70)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generic_workspace_is_never_exceeded_and_smaller_than_the_matrix(dtype):
    """The allocator's own report, on a matrix of several tiles."""
    case = make_case(3000, 1024, 3, 64, False)
    x = make_input(2, 1024, dtype)
    peak = peak_bytes(lambda: generic.matmul(x, case.codes, case.scales, case.zeros, case.fmt, 16))
    declared = generic.workspace_bytes(case.fmt, 2, 3000, dtype, 16)
    result_bytes = 2 * 3000 * dtype.itemsize
    assert 0 < peak - result_bytes <= declared < 4 * 3000 * 1024
    assert declared < 1.3 * (peak - result_bytes)


def test_workspace_and_name_agree_with_the_choice():
    kernel = registry.choose_kernel(make_case(3, 64, 4, 24, True).fmt, 1, torch.float32, 16)
    assert kernel_name(1, 3, 64, bits=4, group_size=24) == kernel.NAME
    assert workspace_bytes(1, 3, 64, bits=4, group_size=24) > 0


def test_wrong_tensors_are_refused():
    case = make_case(5, 70, 4, 64, True)
    x = make_input(1, 70)
    with pytest.raises(UsageError, match="70 columns"):
        packed_matmul(x[:, :69], case.codes, case.scales, **case.arguments)
    with pytest.raises(UsageError, match=r"uint8 \(out, 64\)"):
        packed_matmul(x, case.codes[:, :-1], case.scales, **case.arguments)
    with pytest.raises(UsageError, match="scales are contiguous float16"):
        packed_matmul(x, case.codes, case.scales.float(), **case.arguments)
    with pytest.raises(UsageError, match="zeros are contiguous uint8"):
        packed_matmul(x, case.codes, case.scales, case.scales, **case.arguments)
    with pytest.raises(UsageError, match="5 rows"):
        packed_rows(torch.tensor([5]), case.codes, case.scales, **case.arguments)
    with pytest.raises(UsageError, match="activation_bits"):
        packed_matmul(x, case.codes, case.scales, **case.arguments, activation_bits=4)
