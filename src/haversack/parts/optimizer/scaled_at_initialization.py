"""Learning rates fixed at the first step: SGD with momentum, scaled per tensor by its first gradient's signal-to-noise ratio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from haversack.parts.base import Source
from haversack.parts.optimizer.base import Moment, Rule, Update

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScaledAtInitialization(Rule):
    """One moment of a weight, and one scalar of a tensor: half of AdamW's bytes.

    A tensor's ratio is its first gradient's norm over its standard deviation; its learning rate is `lr` times the ratio over
    the root of the largest tensor's number of elements (`largest_elements` of its group), which is that tensor's ratio where
    the mean gradient is zero. Source: Xu et al. 2024, arXiv 2412.11768, algorithm 1; differs from the authors' program, which
    divides by the largest ratio met, in that each tensor's scale needs no other's gradient.
    """

    id: ClassVar[str] = "scaled-at-initialization"
    title: ClassVar[str] = "momentum with learning rates fixed by the first gradient's signal-to-noise ratio"
    source: ClassVar[Source] = Source(
        "Xu, Xiang, Cai and Wen",
        2024,
        "No More Adam: Learning Rate Scaling at Initialization is All You Need",
        "2412.11768",
        "algorithm 1",
    )
    counts_steps: ClassVar[bool] = False
    scalars: ClassVar[tuple[str, ...]] = ("signal_to_noise",)

    lr: float = 1e-2
    momentum: float = 0.9
    eps: float = 1e-8
    weight_decay: float = 1e-2

    def moments(self, shape: tuple[int, ...]) -> tuple[Moment, ...]:
        return (Moment("momentum_buffer", shape, signed=True),)

    def begin(
        self,
        grad: torch.Tensor,
        scalars: Mapping[str, torch.Tensor],
        step: int,
        group: Mapping[str, Any],
        parameter: torch.Tensor,
    ) -> tuple[bool, float]:
        """Whether this is the first step, and this tensor's step size."""
        import torch

        ratio = scalars["signal_to_noise"]
        first = ratio.item() == 0
        if first:
            g = grad.float()
            spread = g.std(correction=1) if g.numel() > 1 else torch.zeros(())
            ratio.copy_(g.norm() / (spread + group["eps"]))
        return first, group["lr"] * ratio.item() / group["largest_elements"] ** 0.5

    def update(
        self,
        grad: torch.Tensor,
        moments: Mapping[str, torch.Tensor],
        begun: tuple[bool, float],
        group: Mapping[str, Any],
    ) -> Update:
        first, step_size = begun
        mean = moments["momentum_buffer"].lerp_(grad, 1.0 if first else 1 - group["momentum"])
        return Update(mean, None, step_size)
