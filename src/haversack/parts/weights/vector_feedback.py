"""Second-order feedback for vector codes: each vector is chosen in the norm of the statistics, after what was lost before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.errors import UsageError
from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import Grid, Rounding, WeightTask
from haversack.parts.weights.damped_factor import damped_factor, required_hessian
from haversack.parts.weights.vector import VectorGrid

if TYPE_CHECKING:
    import torch

_TINY, _RUN_COLUMNS = 1e-20, 128


@dataclass(frozen=True)
class VectorFeedback(Rounding):
    """Rounds vectors one after another along the rows: each is the codebook's nearest, in the norm that the statistics have on
    its columns, to what feedback has left of it. Stores nothing of its own.

    `damping` as in `HessianFeedback`. After `turns` (1 to 16) turns of choosing codes and fitting the codebook to them, by least squares
    in the same norms, follow `num_sweeps` (0 to 16) passes of coordinate descent over whole vectors, with a fit after each. What
    has the least output error is kept, nearest rounding among it.

    Cost for `(out, in)`: `out in (in + 2 * 256)` flops per turn, twice as many per sweep. Error: never above nearest rounding's in the output norm. Source:
    Liu et al. 2024 (arXiv 2409.17066, section 3.1 and algorithm 1); differs in the whole norm of a vector's columns instead of
    their diagonal, and in turns.
    """

    id: ClassVar[str] = "vector-feedback"
    title: ClassVar[str] = "second-order feedback over vectors"
    source: ClassVar[Source | None] = VectorGrid.source
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    damping: float = 0.01
    turns: int = 3
    num_sweeps: int = 4

    def __post_init__(self) -> None:
        check_range(self.id, "damping", self.damping, "above 0 and at most 1", 0 < self.damping <= 1)
        check_range(self.id, "turns", self.turns, "from 1 to 16", 1 <= self.turns <= 16)
        check_range(self.id, "num_sweeps", self.num_sweeps, "from 0 to 16", 0 <= self.num_sweeps <= 16)

    def round(self, task: WeightTask, grid: Grid) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if not isinstance(grid, VectorGrid):
            raise UsageError(f"{self.id} rounds vector codes, not {grid.id}; choose hessian-feedback.")
        hessian = required_hessian(task)
        factor, added = damped_factor(hessian, self.damping, task.notes)
        scales = grid.fit(task.weight, hessian.diagonal())
        best = grid.quantize(task.weight, scales), scales
        least = _error(task, grid, *best)
        for _ in range(self.turns):
            codes, vectors = _feed_back(task.weight, factor, grid, scales)
            if (error := _error(task, grid, codes, scales)) < least:
                best, least = (codes, scales), error
            scales = {**scales, "vectors": vectors}
        damped = hessian.float().clone()
        damped.diagonal().add_(added)
        for _ in range(self.num_sweeps):
            codes, vectors = _sweep(task.weight, damped, grid, *best)
            for tried in (best[1], {**scales, "vectors": vectors}):
                if (error := _error(task, grid, codes, tried)) < least:
                    best, least = (codes, tried), error
        return best


def _error(task: WeightTask, grid: VectorGrid, codes: torch.Tensor, scales: dict[str, torch.Tensor]) -> float:
    change = grid.dequantize(codes, scales).sub_(task.weight)
    assert task.hessian is not None
    return float(((change @ task.hessian.float()) * change).sum())


def _feed_back(
    weight: torch.Tensor, factor: torch.Tensor, grid: VectorGrid, scales: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `(out, in)`, and the codebook that would have served them best.

    With `H = R R^T`, R upper triangular, and e what rounding changes, a row's error is the sum over vectors K of
    `|R_KK^T e_K + sum over earlier j of R_jK^T e_j|^2`: what was lost before only moves the target of the next.
    """
    import torch

    out_features, in_features = weight.shape
    table = scales["vectors"].float()
    scale_of = grid.coding.values(scales)
    carried = torch.zeros(out_features, in_features)  # the sum over earlier columns
    codes, fit = torch.empty(out_features, in_features, dtype=torch.uint8), _Fit(table)
    changes = torch.empty(out_features, in_features)
    for first in range(0, in_features, grid.length):
        block = slice(first, min(first + grid.length, in_features))
        own, near = factor[block, block], _stop(first, in_features)
        group = first // grid.group_size if grid.group_size else 0
        scale = scale_of[:, group : group + 1]
        # b = R_KK^T t, so that t = R_KK^-T b
        target = weight[:, block] - torch.linalg.solve_triangular(own.T, carried[:, block].T, upper=False).T
        chosen = fit.choose(target, scale, own @ own.T)
        codes[:, block] = chosen[:, None].to(torch.uint8)
        changes[:, block] = table[chosen, : block.stop - first] * scale - weight[:, block]
        if block.stop < near:
            carried[:, block.stop : near].addmm_(changes[:, block], factor[block, block.stop : near])
        elif near < in_features:
            run = slice(first - first % _RUN_COLUMNS, near)
            carried[:, near:].addmm_(changes[:, run], factor[run, near:])
    return codes, fit.vectors()


def _sweep(
    weight: torch.Tensor, hessian: torch.Tensor, grid: VectorGrid, codes: torch.Tensor, scales: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `(out, in)`, each vector's the best while the others stay, and the codebook that would have served them best.

    With `G = E H`, vector K is best at the codebook's nearest to `w_K + e_K - G_K H_KK^-1` in the norm of `H_KK`.
    """
    import torch

    table, codes = scales["vectors"].float(), codes.clone()
    scale_of, fit = grid.coding.values(scales), _Fit(table)
    change = grid.dequantize(codes, scales).sub_(weight)
    product, moved = change @ hessian, torch.zeros_like(change)
    for first in range(0, weight.shape[1], grid.length):
        block = slice(first, min(first + grid.length, weight.shape[1]))
        group = first // grid.group_size if grid.group_size else 0
        scale, norm, before = scale_of[:, group : group + 1], hessian[block, block], change[:, block]
        target = weight[:, block] + before - torch.linalg.solve(norm, product[:, block].T).T
        chosen = fit.choose(target, scale, norm)
        codes[:, block] = chosen[:, None].to(torch.uint8)
        moved[:, block] = table[chosen, : block.stop - first] * scale - weight[:, block] - before
        near = _stop(first, weight.shape[1])
        run = slice(first - first % _RUN_COLUMNS, near)
        if block.stop < near:  # columns before it are not looked at again
            product[:, block.stop : near].addmm_(moved[:, block], hessian[block, block.stop : near])
        elif near < weight.shape[1]:
            product[:, near:].addmm_(moved[:, run], hessian[run, near:])
    return codes, fit.vectors()


def _stop(column: int, in_features: int) -> int:
    """Where the run of columns ends that a column is in: changes reach what lies beyond it run by run."""
    return min(column - column % _RUN_COLUMNS + _RUN_COLUMNS, in_features)


class _Fit:
    """Chooses vectors of a codebook `(256, length)`, and gathers what a better one is made of."""

    def __init__(self, table: torch.Tensor):
        import torch

        self.table = table
        self.squares = torch.zeros(len(table), table.shape[1], table.shape[1])
        self.pulls = torch.zeros_like(table)

    def choose(self, target: torch.Tensor, scale: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """The index of the vector that, times `scale` `(rows, 1)`, is nearest to each row of `target` `(rows, width)`, in the norm
        `(width, width)`."""
        import torch

        width = target.shape[1]
        some = self.table[:, :width]
        turned = some @ norm
        chosen = (scale.square() * (some * turned).sum(1)).addmm_(scale * target, turned.T, alpha=-2).argmin(1)
        total = torch.zeros(len(some)).index_add_(0, chosen, scale.square().squeeze(1))
        self.squares[:, :width, :width] += total[:, None, None] * norm
        self.pulls[:, :width].index_add_(0, chosen, (scale * target) @ norm)
        return chosen

    def vectors(self) -> torch.Tensor:
        """The codebook of least squared distance to all targets, float16; vectors that none chose stay."""
        import torch

        diagonal = self.squares.diagonal(dim1=1, dim2=2)
        used = diagonal.amin(1) > _TINY
        diagonal.add_(1e-6 * diagonal.mean(1, keepdim=True).clamp_min(_TINY))
        return torch.where(used[:, None], torch.linalg.solve(self.squares, self.pulls), self.table).half()
