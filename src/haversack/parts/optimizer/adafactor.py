"""Adafactor: the second moment of a matrix kept as one number per row and one per column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from haversack.parts.base import Source
from haversack.parts.optimizer.base import Moment, Rule, Update

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Adafactor(Rule):
    """`rows + columns` numbers of a matrix, and one for each number of a vector. Equal to `torch.optim.Adafactor` to the
    bit.

    Source: Shazeer and Stern 2018, arXiv 1804.04235, algorithms 4 and 5.
    """

    id: ClassVar[str] = "adafactor-rule"
    title: ClassVar[str] = "second moments as a product of rows and columns, no first moment"
    source: ClassVar[Source] = Source(
        "Shazeer and Stern",
        2018,
        "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
        "1804.04235",
        "algorithms 4 and 5",
    )
    elementwise: ClassVar[bool] = False
    in_subspaces: ClassVar[bool] = False

    lr: float = 1e-3
    beta2_decay: float = -0.8
    eps: float = 1e-3
    clip: float = 1.0
    weight_decay: float = 0.0

    def moments(self, shape: tuple[int, ...]) -> tuple[Moment, ...]:
        if len(shape) < 2:
            return (Moment("variance", shape, signed=False, coded=False),)
        rows, columns = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
        return (
            Moment("row_var", rows, signed=False, coded=False),
            Moment("col_var", columns, signed=False, coded=False),
        )

    def begin(
        self,
        grad: torch.Tensor,
        scalars: Mapping[str, torch.Tensor],
        step: int,
        group: Mapping[str, Any],
        parameter: torch.Tensor,
    ) -> tuple[float, float]:
        """How much of the new is mixed in, and the step for an update whose root mean square is 1."""
        size = parameter.norm(2).item() / parameter.numel() ** 0.5
        return float(step) ** group["beta2_decay"], max(group["eps"], size) * min(group["lr"], step**-0.5)

    def update(
        self,
        grad: torch.Tensor,
        moments: Mapping[str, torch.Tensor],
        begun: tuple[float, float],
        group: Mapping[str, Any],
    ) -> Update:
        import torch

        mixed, step_size = begun
        least = torch.finfo(grad.dtype).eps
        if grad.ndim > 1:
            for name, axis in (("row_var", -1), ("col_var", -2)):
                mean = torch.norm(grad, dim=axis, keepdim=True).square_().div_(grad.shape[axis])
                moments[name].lerp_(mean, mixed)
            rows = moments["row_var"]
            variance = rows @ moments["col_var"]
            variance.div_(rows.mean(dim=-2, keepdim=True).clamp_(min=least))
        else:
            variance = moments["variance"].lerp_(grad * grad, mixed).clone()
        update = variance.clamp_(min=least * least).rsqrt_().mul_(grad)
        size = update.norm(2).item() / (update.numel() ** 0.5 * group["clip"])
        return Update(update, None, step_size / max(1.0, size))
