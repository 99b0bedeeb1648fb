"""Pruned matrices: what is kept, how much of it, and what feedback makes up for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haversack.errors import CheckpointError, UsageError
from haversack.parts.weights.base import WeightOption, WeightTask
from haversack.parts.weights.dropped import DroppedGrid
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.parts.weights.sparse import SparseGrid
from haversack.parts.weights.sparse_feedback import SparseFeedback


def task_of(rows: int, columns: int, seed: int = 0) -> WeightTask:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.3 * torch.eye(columns)
    x = torch.randn(4 * columns, columns, generator=generator) @ mixing * torch.linspace(0.1, 3, columns)
    return WeightTask(torch.randn(rows, columns, generator=generator) * 0.05, x.T @ x / len(x))


def error(option: WeightOption, task: WeightTask) -> float:
    given = WeightTask(task.weight, task.hessian)
    change = option.dense(option.encode(given), *task.weight.shape) - task.weight
    return float(((change @ task.hessian) * change).sum())


@settings(max_examples=40, deadline=None)
@given(
    per=st.sampled_from([0, 2, 3, 4, 8, 10, 150]),
    columns=st.integers(1, 300),
    kept=st.floats(0.1, 0.9),
    feedback=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_row_keeps_as_many_as_are_stored(per, columns, kept, feedback, seed):
    density = max(1, round(kept * per)) / per if per else kept
    if density >= 1:
        density = (per - 1) / per
    grid = SparseGrid(density, per)
    task = task_of(3, columns, seed)
    dense = WeightOption(grid, SparseFeedback(turns=1) if feedback else NearestRounding())
    matrix = dense.dense(dense.encode(task), 3, columns)
    assert bool(((matrix != 0).sum(1) <= grid.num_kept(columns)).all())
    if per:
        whole = matrix[:, : columns // per * per].view(3, -1, per)
        assert bool(((whole != 0).sum(-1) <= round(density * per)).all())
    elif not feedback:  # kept weights are the matrix's own, to float16
        values = matrix[matrix != 0]
        assert torch.equal(values, task.weight[matrix != 0].half().float())


def test_largest_magnitudes_stay_and_inputs_weigh():
    weight = torch.tensor([[4.0, -3.0, 2.0, -1.0]])
    hessian = torch.diag(torch.tensor([1.0, 1.0, 1.0, 100.0]))
    plain = WeightOption(SparseGrid(0.5, weighted=False), NearestRounding())
    assert plain.dense(plain.encode(WeightTask(weight, hessian)), 1, 4).tolist() == [[4.0, -3.0, 0.0, 0.0]]
    weighed = WeightOption(SparseGrid(0.5), NearestRounding())
    assert weighed.dense(weighed.encode(WeightTask(weight, hessian)), 1, 4).tolist() == [[4.0, 0.0, 0.0, -1.0]]


@pytest.mark.parametrize("pattern", [(0.5, 0), (0.5, 4), (0.5, 10), (0.3, 0)])
@pytest.mark.parametrize("values", ["f16", "max4"])
def test_each_idea_takes_off_error(pattern, values):
    """Magnitude, then inputs, then feedback: the papers' order (correlated inputs of unequal size)."""
    task = task_of(48, 200)
    by_magnitude = error(WeightOption(SparseGrid(*pattern, values, weighted=False), NearestRounding()), task)
    by_inputs = error(WeightOption(SparseGrid(*pattern, values), NearestRounding()), task)
    fed_back = error(WeightOption(SparseGrid(*pattern, values), SparseFeedback()), task)
    assert fed_back < 0.85 * by_inputs < by_magnitude


def test_fitting_all_kept_weights_takes_off_more():
    task = task_of(48, 200)
    errors = [error(WeightOption(SparseGrid(0.5), SparseFeedback(turns=turns)), task) for turns in (0, 2, 16)]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.8 * errors[0]


def test_statistics_that_are_not_positive_definite_are_damped_and_said():
    task = task_of(8, 64)
    task.hessian = task.hessian - 0.3 * task.hessian.diagonal().mean() * torch.eye(64)
    WeightOption(SparseGrid(0.5), SparseFeedback()).encode(task)
    assert any("not positive definite" in note for note in task.notes)


def test_wrong_company_is_refused_by_name():
    task = task_of(8, 64)
    with pytest.raises(UsageError, match="sparse-feedback prunes sparse matrices, not integer"):
        WeightOption(IntegerGrid(4, 64), SparseFeedback()).encode(task)
    with pytest.raises(UsageError, match="whole rows"):
        WeightOption(SparseGrid(0.5), HessianFeedback()).encode(task)
    with pytest.raises(UsageError, match="needs calibration statistics"):
        WeightOption(SparseGrid(0.5), SparseFeedback()).encode(WeightTask(task.weight))
    with pytest.raises(UsageError, match="a whole number of 6 columns"):
        SparseGrid(0.25, 6)
    for bad, word in ((float("nan"), "finite"), (1e9, "exceeds")):
        weight = task.weight.clone()
        weight[0, 0] = bad
        with pytest.raises(CheckpointError, match=word):
            WeightOption(SparseGrid(0.5), NearestRounding()).encode(WeightTask(weight))


def test_a_dropped_matrix_stores_nothing_and_multiplies_to_zero():
    option = WeightOption(DroppedGrid(), NearestRounding())
    tensors = option.encode(task_of(8, 64))
    assert tensors == {} and option.stored_bytes(8, 64, "BF16") == 0
    product = option.linear(torch.ones(2, 3, 64, dtype=torch.bfloat16), tensors, 8)
    assert product.shape == (2, 3, 8) and product.dtype == torch.bfloat16 and not product.any()
