"""What the subspace leaves out steps by its sign."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.optimizer.base import Reduced, Residual

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SignedResidual(Residual):
    """Keeps nothing. Each number outside the subspace steps by the learning rate times `scale`.

    Source: Zmushko et al. 2024, arXiv 2411.07837, algorithm 1 with signSGD.
    """

    id: ClassVar[str] = "signed-residual"
    title: ClassVar[str] = "the sign of the gradient outside the subspace"
    source: ClassVar[Source] = Source(
        "Zmushko, Beznosikov, Takac and Horvath",
        2024,
        "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
        "2411.07837",
        "algorithm 1",
    )

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_range(self.id, "scale", self.scale, "above 0", self.scale > 0)

    def combine(self, step: Reduced, scalars: Mapping[str, torch.Tensor], lr_per_step_size: float) -> torch.Tensor:
        rest = step.grad - step.expand(step.reduced)
        rest.sign_().mul_(self.scale * lr_per_step_size)
        return rest.add_(step.expand(step.direction))
