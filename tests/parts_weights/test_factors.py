"""Matrices made of factors alone, learned clipping, smoothing, bytes on a normal table, and a datatype per group."""

import pytest
import torch

from haversack.codecs.codebooks import codebook
from haversack.errors import UsageError
from haversack.parts.weights.base import WeightOption, WeightTask
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.dropped import DroppedGrid
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.learned_clipping import LearnedClipping
from haversack.parts.weights.low_rank import LowRankCorrection
from haversack.parts.weights.nearest import NearestRounding
from haversack.parts.weights.residual_planes import ResidualPlanes
from haversack.parts.weights.sign_stack import SignStack
from haversack.parts.weights.smoothing import SmoothingScale
from haversack.parts.weights.tensor_network import TensorNetwork
from haversack.parts.weights.trellis import TrellisGrid
from haversack.parts.weights.typed import TypedGrid

NEAREST = NearestRounding()


def task_of(rows: int, columns: int, seed: int = 0) -> WeightTask:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.3 * torch.eye(columns)
    x = torch.randn(4 * columns, columns, generator=generator) @ mixing * torch.linspace(0.1, 3, columns)
    return WeightTask(torch.randn(rows, columns, generator=generator) * 0.05, x.T @ x / len(x))


def alone(*corrections) -> WeightOption:
    return WeightOption(DroppedGrid(), NEAREST, corrections=corrections)


def dense(option: WeightOption, task: WeightTask) -> torch.Tensor:
    return option.dense(option.encode(WeightTask(task.weight, task.hessian)), *task.weight.shape)


def error(option: WeightOption, task: WeightTask) -> float:
    return error_of(option, option.encode(WeightTask(task.weight, task.hessian)), task)


def error_of(option: WeightOption, tensors: dict[str, torch.Tensor], task: WeightTask) -> float:
    change = option.dense(tensors, *task.weight.shape) - task.weight
    return float(((change @ task.hessian) * change).sum())


@pytest.mark.parametrize(
    "option",
    [
        alone(SignStack(6, 3)),
        WeightOption(CodebookGrid("max2", 32, "u4"), HessianFeedback(), corrections=(ResidualPlanes(5, 64, 1),)),
        WeightOption(IntegerGrid(2, 64), NEAREST, corrections=(LowRankCorrection(1), ResidualPlanes(3))),
    ],
    ids=str,
)
def test_the_first_blocks_of_a_stack_are_the_shorter_stack(option):
    """What makes any prefix of a stored matrix a model of its own."""
    task = task_of(24, 70)
    whole = option.encode(WeightTask(task.weight, task.hessian))
    errors = []
    for blocks in range(option.least_blocks, option.stack.blocks + 1):
        shorter = option.shortened(blocks)
        prefix = {
            name: tensor
            for name, tensor in whole.items()
            if (option.block_of(name) or 0) < blocks or option.block_of(name) is None
        }
        made = shorter.encode(WeightTask(task.weight, task.hessian))
        assert prefix.keys() == made.keys() and all(torch.equal(prefix[n], t) for n, t in made.items())
        errors.append(error_of(shorter, prefix, task))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]


@pytest.mark.parametrize("shape", [(24, 36), (7, 11), (1, 64), (30, 49)])
def test_a_bond_that_is_wide_enough_is_the_matrix(shape):
    task = task_of(*shape)
    assert torch.allclose(dense(alone(TensorNetwork(4096)), task), task.weight, atol=2e-4)
    errors = [float((dense(alone(TensorNetwork(bond)), task) - task.weight).square().sum()) for bond in (1, 3, 9, 27)]
    assert errors == sorted(errors, reverse=True)


def test_a_kronecker_product_has_one_bond():
    weight = torch.kron(torch.randn(4, 5), torch.randn(6, 7)) / 4
    assert torch.allclose(dense(alone(TensorNetwork(1)), WeightTask(weight)), weight, atol=5e-3)


def test_ranks_by_what_each_matrix_loses_beat_one_rank_for_all():
    """Two matrices of one shape, one of them nearly of rank 4: as many bytes, shared by the spectrum."""
    task, other = task_of(40, 48), task_of(40, 48, 1)
    other.weight = torch.randn(40, 4) @ torch.randn(4, 48) / 10 + other.weight / 100
    same = sum(error(alone(LowRankCorrection(16)), t) for t in (task, other))
    own = error(alone(LowRankCorrection(26)), task) + error(alone(LowRankCorrection(6)), other)
    assert own < 0.7 * same


@pytest.mark.parametrize(
    "grid",
    [IntegerGrid(2, 64, False), IntegerGrid(3, 64), CodebookGrid("max2", 32), CodebookGrid("max3", 16, "u4")],
    ids=str,
)
def test_clipping_that_is_learned_loses_less(grid):
    task = task_of(48, 128)
    nearest = error(WeightOption(grid, NEAREST), task)
    learned = error(WeightOption(grid, LearnedClipping()), task)
    assert learned < 0.97 * nearest
    assert error(WeightOption(grid, LearnedClipping(turns=4)), task) <= 1.001 * nearest  # but for scales' own rounding


def test_learned_clipping_needs_values_to_clip_to():
    with pytest.raises(UsageError, match="needs a grid of few values per group, not trellis"):
        WeightOption(TrellisGrid(2), LearnedClipping()).encode(task_of(4, 64))


def test_smoothing_changes_no_product_and_shares_outliers():
    task = task_of(32, 64)
    task.weight[:, 5] *= 0.02
    task.hessian[5] *= 30
    task.hessian[:, 5] *= 30  # a large input that meets small weights
    option = WeightOption(IntegerGrid(4, 64), NEAREST, (SmoothingScale(),))
    part, given = option.transforms[0], WeightTask(task.weight, task.hessian)
    stored = part.apply(given, option.grid)
    x = torch.randn(3, 64)
    assert torch.allclose(part.transform_input(x, stored) @ given.weight.T, x @ task.weight.T, atol=1e-4)
    assert error(option, task) < error(WeightOption(IntegerGrid(4, 64), NEAREST), task)
    with pytest.raises(UsageError, match="smoothing: scales follow calibration statistics"):
        option.encode(WeightTask(task.weight))


def test_bytes_on_a_normal_table_lose_half_of_what_even_steps_do():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    normal = (codebook("max8").nearest_values(x) - x).square().mean()
    even = min(((x / s).round().clamp(-128, 127) * s - x).square().mean() for s in torch.linspace(0.025, 0.04, 31))
    assert normal < 0.5 * even


@pytest.mark.parametrize("bits", (3, 4))
def test_every_group_finds_its_own_datatype(bits):
    """Values of each type come back exactly, and on normal weights the best of four types beats each alone and integers."""
    grid = TypedGrid(bits, 32)
    table = grid.tables
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(1 << bits, (16, 4, 32), generator=draw)
    codes[..., 0], codes[..., 1] = 0, (1 << bits) - 1  # both ends, so that the scale is known
    for number in range(4):  # each type's special value is there, in its own group
        codes[:, number, 2] = int((~torch.isin(table[number], table[number - 1])).nonzero()[0])
    weight = torch.stack([table[number][codes[:, number]] for number in range(4)], 1).flatten(1) / 64
    option = WeightOption(grid, NearestRounding())
    tensors = option.encode(WeightTask(weight.clone()))
    assert torch.equal(option.dense(tensors, *weight.shape), weight)
    assert tensors["types"].shape == (16, 1) and bool((tensors["types"] == 0b11100100).all())
    normal = torch.randn(64, 256, generator=draw)
    grids = {"typed": TypedGrid(bits), "integer": IntegerGrid(bits, 128)}
    errors = {}
    for name, of in grids.items():
        option = WeightOption(of, NearestRounding())
        errors[name] = float((option.dense(option.encode(WeightTask(normal.clone())), 64, 256) - normal).square().sum())
    assert errors["typed"] < errors["integer"]
