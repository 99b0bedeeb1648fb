"""What the subspace leaves out steps along the plain gradient, as far as the subspace's own columns do."""

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
class NormScaledResidual(Residual):
    """No moments of its own; one scalar, the last norm.

    Column by column, the residual is scaled by the norm of the rule's direction over that of the reduced gradient. Source:
    Chen et al. 2024, arXiv 2410.01623, equations 4 to 6.
    """

    id: ClassVar[str] = "norm-scaled-residual"
    title: ClassVar[str] = "the gradient outside the subspace, scaled as the rule scales inside it"
    source: ClassVar[Source] = Source(
        "Chen, Feng, Li, Lai, Yue, Yuan and Wang",
        2024,
        "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
        "2410.01623",
        "equations 4 to 6",
    )
    scalars: ClassVar[tuple[str, ...]] = ("residual_norm",)

    most_growth: float = 1.01

    def __post_init__(self) -> None:
        check_range(self.id, "most_growth", self.most_growth, "1 or more", self.most_growth >= 1)

    def combine(self, step: Reduced, scalars: Mapping[str, torch.Tensor], lr_per_step_size: float) -> torch.Tensor:
        scale = step.direction.norm(dim=0) / (step.reduced.norm(dim=0) + 1e-8)
        rest = step.grad - step.expand(step.reduced)
        rest.mul_(scale)
        limit_growth(rest, scalars["residual_norm"], self.most_growth)
        return rest.add_(step.expand(step.direction))
