"""SGD with momentum: the step is a decaying sum of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from haversack.parts.base import Source
from haversack.parts.optimizer.base import Moment, Rule, Update

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SGDMomentum(Rule):
    """One moment of a weight: its own bytes. Equal to `torch.optim.SGD` to the bit, but that weight decay is decoupled.

    Source: Polyak 1964, "Some methods of speeding up the convergence of iteration methods".
    """

    id: ClassVar[str] = "sgd-momentum"
    title: ClassVar[str] = "steps by a decaying sum of gradients"
    source: ClassVar[Source] = Source(
        "Polyak", 1964, "Some methods of speeding up the convergence of iteration methods"
    )
    counts_steps: ClassVar[bool] = False

    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0

    def moments(self, shape: tuple[int, ...]) -> tuple[Moment, ...]:
        return (Moment("momentum_buffer", shape, signed=True),)

    def update(
        self, grad: torch.Tensor, moments: Mapping[str, torch.Tensor], begun: int, group: Mapping[str, Any]
    ) -> Update:
        total = moments["momentum_buffer"].mul_(group["momentum"]).add_(grad)
        return Update(total, None, group["lr"])
