"""Row programs against float64: every operation, dtype and way of lying in memory."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haversack.kernels.ir_float import converts_half
from haversack.kernels.ir_rows import FUNCTIONS, RECORD, Operand, RowStep, rows_text
from haversack.kernels.llvm import compile_text, host_target

EXPECTED = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "copy": torch.clone, "neg": torch.neg,
    "square": torch.square, "cube": lambda x: x**3, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal, "sigmoid": torch.sigmoid, "silu": torch.nn.functional.silu, "tanh": torch.tanh,
    "gelu": torch.nn.functional.gelu, "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu, "mean": lambda x: x.mean(-1, keepdim=True),
}  # fmt: skip
ROUNDING = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Of the result's magnitude; float32's stands for functions made of exp, and for sums in another order."""


def run(step: RowStep, tensors: list[torch.Tensor], num_rows: int) -> None:
    module = compile_text(rows_text((step,), host_target()), host_target())
    words = [0, num_rows, 0, 1, *(tensor.data_ptr() for tensor in tensors)]
    record = (ctypes.c_int64 * len(words))(*words)
    assert len(words) == len(RECORD) + len(tensors)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(module.address("rows"))(ctypes.addressof(record))


def test_every_operation_is_tested():
    assert set(EXPECTED) == FUNCTIONS


@pytest.mark.parametrize("op", sorted(FUNCTIONS))
@given(
    count=st.integers(1, 70),
    stride=st.sampled_from([1, 2, 3]),
    dtype=st.sampled_from(list(ROUNDING)),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=12, deadline=None)
def test_an_operation_against_float64(op, count, stride, dtype, seed):
    if dtype == torch.float16 and not converts_half(host_target()):
        return
    num_rows, generator = 3, torch.Generator().manual_seed(seed)
    positive = op in ("sqrt", "rsqrt", "reciprocal", "div")
    two = op in ("add", "sub", "mul", "div")

    def numbers() -> torch.Tensor:
        x = 3 * torch.randn(num_rows, count * stride, generator=generator)
        return (x.abs() + 0.25 if positive else x).to(dtype)

    sources = [numbers() for _ in range(2 if two else 1)]
    width = 1 if op == "mean" else count
    out = torch.full((num_rows, width * stride), 77.0, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    inputs = tuple(Operand(i, name, count * stride, 0, (stride,)) for i in range(len(sources)))
    written = Operand(len(sources), name, width * stride, 0, (0 if op == "mean" else stride,))
    run(RowStep(op, (count,), inputs, written), [*sources, out], num_rows)
    expected = EXPECTED[op](*(source[:, ::stride].double() for source in sources))
    scale = max(1.0, float(expected.abs().max()))
    assert (out[:, ::stride].double() - expected).abs().max() <= ROUNDING[dtype] * scale
    between = torch.ones(width * stride, dtype=torch.bool)
    between[::stride] = False
    assert bool((out[:, between] == 77).all())  # what lies between is not written


def test_a_number_and_a_broadcast_operand():
    x, one, out = torch.randn(2, 20), torch.randn(2, 1), torch.empty(2, 20)
    step = RowStep(
        "mul", (20,), (Operand(0, "float32", 20, 0, (1,)), Operand(1, "float32", 1, 0, (0,))),
        Operand(2, "float32", 20, 0, (1,)),
    )  # fmt: skip
    run(step, [x, one, out], 2)
    torch.testing.assert_close(out, x * one)
    run(
        RowStep("add", (20,), (Operand(0, "float32", 20, 0, (1,)), 0.5), Operand(1, "float32", 20, 0, (1,))),
        [x, out],
        2,
    )
    torch.testing.assert_close(out, x + 0.5)
