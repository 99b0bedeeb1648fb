"""Learned clipping: how far each group is clipped is learned by gradient from the error of the matrix's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.errors import UsageError
from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import Grid, Rounding, ScalarCodes, WeightTask
from haversack.parts.weights.damped_factor import required_hessian

if TYPE_CHECKING:
    import torch

_DECAY, _SQUARE_DECAY, _TINY = 0.9, 0.99, 1e-20


@dataclass(frozen=True)
class LearnedClipping(Rounding):
    """Rounds to nearest under scales that follow the gradient of the output error `tr(E H E^T)` for `turns` (1 to 1024) of Adam's steps of
    `rate` (above 0, to 0.5), relative to the scale that the grid's own search begins with.

    Through the rounding itself the gradient passes as if it were not there; a clipped weight moves with its end of the range. Of each
    row the best scales met are kept, the first ones among them. Cost for `(out, in)`: `2 turns out in^2` flops; workspace: six copies of `weight`, float32. Error: never above nearest
    rounding's in the output norm, but for the scales' own rounding. Source: Shao et al. 2023 (arXiv 2308.13137, section 3.2: learnable weight clipping); differs in the
    error of each matrix's output, by its statistics, instead of a block's, and in one factor per group with its zero point kept.
    """

    id: ClassVar[str] = "learned-clipping"
    title: ClassVar[str] = "clipping learned by gradient"
    source: ClassVar[Source | None] = Source(
        "Shao, Chen, Zhang, Xu, Zhao, Li, Zhang, Gao, Qiao, Luo",
        2023,
        "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models",
        "2308.13137",
        "section 3.2",
    )
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    turns: int = 64
    rate: float = 0.05

    def __post_init__(self) -> None:
        check_range(self.id, "turns", self.turns, "from 1 to 1024", 1 <= self.turns <= 1024)
        check_range(self.id, "rate", self.rate, "above 0 and at most 0.5", 0 < self.rate <= 0.5)

    def round(self, task: WeightTask, grid: Grid) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        hessian = required_hessian(task).float()
        scales = grid.fit(task.weight, hessian.diagonal())
        scalar = grid.scalar_codes(scales)
        if scalar is None:
            raise UsageError(
                f"{self.id} needs a grid of few values per group, not {grid.id}; choose integers or a table."
            )
        learned = self._learned(task.weight, hessian, scalar)
        for group in range(learned.shape[1]):
            grid.set_scale(scales, group, learned[:, group])
        return grid.quantize(task.weight, scales), scales

    def _learned(self, weight: torch.Tensor, hessian: torch.Tensor, scalar: ScalarCodes) -> torch.Tensor:
        """Scales `(out, groups)`."""
        import torch

        first, columns = scalar.scale, weight.shape[1]
        group = torch.arange(columns) // scalar.group_columns
        factor, mean, square = torch.ones_like(first), torch.zeros_like(first), torch.zeros_like(first)
        best, least = first, torch.full((len(weight),), torch.inf)
        for turn in range(1, self.turns + 1):
            scale = first * factor
            of_columns = scale[:, group]
            ratio = weight / of_columns.where(of_columns != 0, torch.tensor(1.0))
            steps, inside = _nearest_steps(ratio, scalar, group)
            change = steps * of_columns - weight
            pushed = change @ hessian
            error = (change * pushed).sum(1)
            best = torch.where((error < least)[:, None], scale, best)
            least = torch.minimum(error, least)
            slope = pushed * torch.where(inside, steps - ratio, steps)
            gradient = torch.zeros_like(first).index_add_(1, group, slope) * first
            mean = _DECAY * mean + (1 - _DECAY) * gradient
            square = _SQUARE_DECAY * square + (1 - _SQUARE_DECAY) * gradient.square()
            step = mean / (1 - _DECAY**turn) / ((square / (1 - _SQUARE_DECAY**turn)).sqrt() + _TINY)
            factor = (factor - self.rate * (1 - (turn - 1) / self.turns) * step).clamp_min(0.05)
        return best


def _nearest_steps(ratio: torch.Tensor, scalar: ScalarCodes, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest value at scale 1 to each of `ratio` `(out, columns)`, and whether it lies within the range of values."""
    import torch

    if scalar.values is None:
        zero = scalar.zero[:, group]
        codes = (ratio + zero).round()
        return codes.clamp(0, scalar.num_codes - 1) - zero, (codes >= 0) & (codes < scalar.num_codes)
    values = torch.tensor(scalar.values)
    places = torch.searchsorted((values[1:] + values[:-1]) / 2, ratio)
    return values[places], (ratio >= values[0]) & (ratio <= values[-1])
