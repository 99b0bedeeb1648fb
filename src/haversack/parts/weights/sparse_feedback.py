"""Pruning with second-order feedback: which weights go is decided column after column, and those that stay make up for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.errors import UsageError
from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import Grid, Rounding, WeightTask
from haversack.parts.weights.damped_factor import damped_factor, required_hessian
from haversack.parts.weights.sparse import SparseGrid

if TYPE_CHECKING:
    import torch

_BLOCK_COLUMNS = 128
_TINY = 1e-30


@dataclass(frozen=True)
class SparseFeedback(Rounding):
    """Chooses what a `SparseGrid` keeps with feedback through the second-order statistics, and fits the kept weights to it.

    With `H = R R^T`, dropping column k of a row costs `R_kk^2 t_k^2` once the columns after it have made up for it as well as they can
    (`t_k` is what feedback has made of the weight): the cheapest go, block by block of 128 columns, or of each pattern. Then `turns` (0 to 64) of
    conjugate gradients fit all kept weights together, and for codes a second pass of feedback rounds them. `damping` as in `HessianFeedback`.

    How many weights a block of a row keeps is how many of the row's largest `|w| sqrt(H_kk)` lie in it. Cost for `(out, in)`: `in^3 / 3 + (4 + 2 turns)
    out in^2` flops. Error: none known. Source: Frantar and Alistarh 2023 (arXiv 2301.00774, section 3); differs in as many weights for each
    row, so that bytes are known, and in the fit afterwards.
    """

    id: ClassVar[str] = "sparse-feedback"
    title: ClassVar[str] = "pruning with second-order feedback"
    source: ClassVar[Source | None] = Source(
        "Frantar, Alistarh", 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", "2301.00774", "section 3"
    )  # fmt: skip
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    damping: float = 0.01
    turns: int = 16

    def __post_init__(self) -> None:
        check_range(self.id, "damping", self.damping, "above 0 and at most 1", 0 < self.damping <= 1)
        check_range(self.id, "turns", self.turns, "from 0 to 64", 0 <= self.turns <= 64)

    def round(self, task: WeightTask, grid: Grid) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if not isinstance(grid, SparseGrid):
            raise UsageError(f"{self.id} prunes sparse matrices, not {grid.id}; choose hessian-feedback.")
        weight, hessian = task.weight, required_hessian(task)
        factor, _ = damped_factor(hessian, self.damping, task.notes)
        damped = factor @ factor.T
        number = _numbers(weight, damped.diagonal(), grid)
        kept, mask = _pruned(weight, factor, grid, number)
        kept = _fitted(weight, damped, kept, mask[:, : weight.shape[1]], self.turns)
        scales = grid.held(kept, mask)
        if grid.codes is not None:
            kept = _rounded(weight, factor, grid, scales)
        return grid.quantize(kept, scales), scales


def _numbers(weight: torch.Tensor, diagonal: torch.Tensor, grid: SparseGrid) -> torch.Tensor:
    """How many weights each block of 128 columns keeps, `(out, blocks)`, where no pattern says so."""
    import torch.nn.functional as F

    first = grid.chosen(weight.abs() * diagonal.clamp_min(0).sqrt())
    return F.pad(first.int(), (0, -first.shape[1] % _BLOCK_COLUMNS)).view(len(weight), -1, _BLOCK_COLUMNS).sum(-1)


def _pruned(
    weight: torch.Tensor, factor: torch.Tensor, grid: SparseGrid, number: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `(out, in)`, and what is kept `(out, padded)`."""
    import torch

    out_features, in_features = weight.shape
    mask = torch.zeros(out_features, grid.padded_features(in_features), dtype=torch.bool)
    square = factor.diagonal().square()

    def choose(target: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """What to keep of the columns `first` to `last`, by what dropping each would cost."""
        score = target.square() * square[first:last]
        if grid.per:
            found = grid.chosen(score)
            mask[:, first : first + found.shape[1]] = found
            return found[:, : last - first]
        rank = score.argsort(1, descending=True).argsort(1)
        found = rank < number[:, first // _BLOCK_COLUMNS, None]
        mask[:, first:last] = found
        return found

    width = grid.per or _BLOCK_COLUMNS
    values = _feed_back(weight, factor, width, choose, lambda target, keep, column: target * keep)
    return values, mask


def _rounded(
    weight: torch.Tensor, factor: torch.Tensor, grid: SparseGrid, scales: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Values `(out, in)` on the codes' table, under scales that stay, with feedback."""
    from haversack.codecs.codebooks import codebook

    assert grid.codes is not None
    mask, table = scales["mask"], codebook(grid.codes.values)
    group = (mask.int().cumsum(1) - 1).clamp_min(0) // grid.codes.group_size
    scale = grid.codes.coding.values(scales).gather(1, group)

    def round_column(target: torch.Tensor, keep: torch.Tensor, column: int) -> torch.Tensor:
        own = scale[:, column]
        return table.nearest_values(target / own.where(own != 0, own.new_tensor(1.0))) * own * keep

    return _feed_back(weight, factor, _BLOCK_COLUMNS, lambda target, first, last: mask[:, first:last], round_column)


def _feed_back(
    weight: torch.Tensor,
    factor: torch.Tensor,
    width: int,
    choose: Callable[[torch.Tensor, int, int], torch.Tensor],
    round_column: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
) -> torch.Tensor:
    """Values `(out, in)`: `choose(targets, first, last)` says what is kept of `width` columns when they are reached,
    `round_column(target, kept, column)` what becomes of one; its error moves the targets of those after it."""
    import torch

    in_features, block = weight.shape[1], width * max(1, _BLOCK_COLUMNS // width)
    values, carried, diagonal = weight.clone(), torch.zeros_like(weight), factor.diagonal()
    for start in range(0, in_features, block):
        stop = min(start + block, in_features)
        for first in range(start, stop, width):
            last = min(first + width, stop)
            keep = choose(weight[:, first:last] - carried[:, first:last] / diagonal[first:last], first, last)
            for k in range(first, last):
                target = weight[:, k] - carried[:, k] / diagonal[k]
                values[:, k] = round_column(target, keep[:, k - first], k)
                carried[:, k + 1 : stop].addr_(values[:, k] - weight[:, k], factor[k, k + 1 : stop])
        carried[:, stop:].addmm_(values[:, start:stop] - weight[:, start:stop], factor[start:stop, stop:])
    return values


def _fitted(
    weight: torch.Tensor, hessian: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, turns: int
) -> torch.Tensor:
    """Kept values of less output error: conjugate gradients of each row, scaled by the diagonal."""
    scaling = mask / hessian.diagonal()
    residual = (values - weight) @ hessian * -1
    step = residual * scaling
    direction, size = step, (residual * step).sum(1)
    for _ in range(turns):
        pushed = direction @ hessian
        length = size / (direction * pushed).sum(1).clamp_min(_TINY)
        values = values + length[:, None] * direction
        residual = residual - length[:, None] * pushed
        step = residual * scaling
        before, size = size, (residual * step).sum(1)
        direction = step + (size / before.clamp_min(_TINY))[:, None] * direction
    return values
