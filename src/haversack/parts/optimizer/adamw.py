"""AdamW: each weight's step is its mean gradient over the root of its mean squared gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from haversack.parts.base import Source
from haversack.parts.optimizer.base import Moment, Rule, Update

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AdamW(Rule):
    """Two moments of a weight: twice its bytes in its own dtype. Equal to `torch.optim.AdamW` to the bit.

    Source: Loshchilov and Hutter 2017, arXiv 1711.05101, algorithm 2.
    """

    id: ClassVar[str] = "adamw-rule"
    title: ClassVar[str] = "steps by the mean gradient over the root of the mean squared gradient"
    source: ClassVar[Source] = Source(
        "Loshchilov and Hutter", 2017, "Decoupled Weight Decay Regularization", "1711.05101", "algorithm 2"
    )

    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2

    def moments(self, shape: tuple[int, ...]) -> tuple[Moment, ...]:
        return Moment("exp_avg", shape, signed=True), Moment("exp_avg_sq", shape, signed=False)

    def update(
        self, grad: torch.Tensor, moments: Mapping[str, torch.Tensor], begun: int, group: Mapping[str, Any]
    ) -> Update:
        beta1, beta2 = group["beta1"], group["beta2"]
        mean = moments["exp_avg"].lerp_(grad, 1 - beta1)
        square = moments["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = square.sqrt().div_((1 - beta2**begun) ** 0.5).add_(group["eps"])
        return Update(mean, root, group["lr"] / (1 - beta1**begun))
