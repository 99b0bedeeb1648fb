"""The whole gradient, scaled as the rule scales its projection: the subspace only measures how far to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.optimizer.base import Reduced, Residual
from haversack.parts.optimizer.growth_limit import limit_growth

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScaledGradient(Residual):
    """No moments of its own; one scalar, the last norm.

    One factor per column, or with `whole` one per matrix: the norm of the rule's direction over that of the reduced gradient,
    times `sqrt(short / rank)`, by which a direction of few rows is shorter than one of all. Source: Zhu et al. 2024, arXiv
    2412.05270, algorithm 1 and section 4.2; the paper leaves that root to the learning rate, and takes `sqrt(128)` at rank 1.
    """

    id: ClassVar[str] = "scaled-gradient"
    title: ClassVar[str] = "the gradient itself, scaled by column or by matrix as the rule scales its projection"
    source: ClassVar[Source] = Source(
        "Zhu, Zhang, Cong, Liu, Park, Chandra, Long, Pan, Wang and Lee",
        2024,
        "APOLLO: SGD-like Memory, AdamW-level Performance",
        "2412.05270",
        "algorithm 1",
    )
    scalars: ClassVar[tuple[str, ...]] = ("residual_norm",)

    whole: bool = False
    most_growth: float = 1.01

    def __post_init__(self) -> None:
        check_range(self.id, "most_growth", self.most_growth, "1 or more", self.most_growth >= 1)

    def combine(self, step: Reduced, scalars: Mapping[str, torch.Tensor], lr_per_step_size: float) -> torch.Tensor:
        axes = (0, 1) if self.whole else (0,)
        scale = step.direction.norm(dim=axes) / (step.reduced.norm(dim=axes) + 1e-8)
        scale *= (step.grad.shape[0] / step.reduced.shape[0]) ** 0.5
        return limit_growth(step.grad * scale, scalars["residual_norm"], self.most_growth)
