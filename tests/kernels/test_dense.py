"""Products with bfloat16 matrices against float64: within a rounding of the result, for any number of rows and threads."""

from __future__ import annotations

import pytest
import torch

from haversack.kernels.dense import matmul, prepared, supports
from haversack.kernels.ir_dense import MOST_TOKENS, STEP_COLUMNS, workspace_bytes


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("num_tokens", range(1, MOST_TOKENS + 1))
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (7, 64), (129, 96), (64, 1024)])
def test_equals_float64_but_for_one_rounding(num_tokens: int, rows: int, columns: int) -> None:
    x, weight = drawn(num_tokens, columns), drawn(rows, columns, seed=1)
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    error = (matmul(x, weight).double() - exact).abs()
    assert torch.all(error <= 2.0**-8 * exact.abs() + 2.0**-20 * magnitude)  # bfloat16, and float32 sums


def test_every_number_of_threads_gives_the_same() -> None:
    x, weight = drawn(2, 512), drawn(3000, 512, seed=1)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(matmul(x, weight))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_prepared_call_reads_what_is_there_and_writes_rows_that_lie_apart() -> None:
    x, weight, wide = drawn(2, 64), drawn(40, 64, seed=1), torch.zeros(2, 100, dtype=torch.bfloat16)
    call = prepared(x, weight, wide[:, 10:50], torch.empty(workspace_bytes(2, 64), dtype=torch.uint8))
    x.copy_(drawn(2, 64, seed=2))
    call()
    assert torch.equal(wide[:, 10:50], matmul(x, weight))
    assert not wide[:, :10].any() and not wide[:, 50:].any()


def test_infinities_and_nans_pass() -> None:
    x, weight = torch.ones(1, 32).bfloat16(), torch.zeros(3, 32).bfloat16()
    weight[0, 3], weight[1, 31] = float("inf"), float("nan")
    found = matmul(x, weight)
    assert found[0, 0] == float("inf") and found[0, 1].isnan() and found[0, 2] == 0


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (drawn(MOST_TOKENS + 1, 64), drawn(8, 64)),
        (drawn(1, STEP_COLUMNS + 1), drawn(8, STEP_COLUMNS + 1)),
        (drawn(1, 64).float(), drawn(8, 64)),
        (drawn(1, 64), drawn(8, 64).half()),
        (drawn(1, 64), drawn(64, 8).T),
    ],
)
def test_what_it_does_not_compute_is_said(x: torch.Tensor, weight: torch.Tensor) -> None:
    assert not supports(x, weight)
