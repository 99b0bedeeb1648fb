"""Muon: a matrix's momentum made orthogonal, so that all of its directions step alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from haversack.parts.base import Source
from haversack.parts.optimizer.base import Moment, Rule, Update

if TYPE_CHECKING:
    import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration whose slope at zero is steepest (Jordan et al. 2024)."""

ITERATIONS = 5


@dataclass(frozen=True)
class Muon(Rule):
    """One moment of a matrix: its own bytes; other tensors are AdamW's. Equal to `torch.optim.Muon` to the bit.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". The iteration runs in bfloat16.
    """

    id: ClassVar[str] = "muon-rule"
    title: ClassVar[str] = "steps by the momentum made orthogonal"
    source: ClassVar[Source] = Source(
        "Jordan et al.", 2024, "Muon: An optimizer for hidden layers in neural networks", where="kellerjordan.github.io"
    )
    elementwise: ClassVar[bool] = False
    matrices_only: ClassVar[bool] = True
    counts_steps: ClassVar[bool] = False

    lr: float = 1e-3
    momentum: float = 0.95
    weight_decay: float = 0.1

    def moments(self, shape: tuple[int, ...]) -> tuple[Moment, ...]:
        return (Moment("momentum_buffer", shape, signed=True),)

    def begin(
        self,
        grad: torch.Tensor,
        scalars: Mapping[str, torch.Tensor],
        step: int,
        group: Mapping[str, Any],
        parameter: torch.Tensor,
    ) -> float:
        """The step size: longer for weights with more rows than columns."""
        return group["lr"] * max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5

    def update(
        self, grad: torch.Tensor, moments: Mapping[str, torch.Tensor], begun: float, group: Mapping[str, Any]
    ) -> Update:
        mean = moments["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        ahead = grad.lerp(mean, group["momentum"])  # Nesterov's
        return Update(orthogonal(ahead).to(grad.dtype), None, begun)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Nearly the nearest orthogonal matrix, bfloat16: singular values come to lie between about 0.7 and 1.2."""
    import torch

    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=1e-7))
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
