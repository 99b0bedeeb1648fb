"""Round every weight to its nearest code: needs no calibration, and is the yardstick of every other rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.weights.base import Grid, Rounding, WeightTask

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class NearestRounding(Rounding):
    """Nearest code of each weight on its own; no bytes of its own.

    Where the task carries second-order statistics, the grid's scales are chosen with their diagonal as importance.
    Error: each weight is as near as the grid allows; correlations between inputs are ignored.
    """

    id: ClassVar[str] = "nearest"
    title: ClassVar[str] = "nearest rounding"

    def round(self, task: WeightTask, grid: Grid) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        importance = None if task.hessian is None else task.hessian.diagonal()
        scales = grid.fit(task.weight, importance)
        return grid.quantize(task.weight, scales), scales
