"""AdamW of natural gradients: each gradient is first divided by what the last ones have in common with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.optimizer.adamw import AdamW
from haversack.parts.optimizer.base import Moment, Update

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class NaturalAdamW(AdamW):
    """AdamW's two moments and the last `history` gradients, of matrices; other tensors are AdamW's.

    With the last gradients as the columns of G, the empirical Fisher matrix is `F = G G^T / history + damping I`, the damping a share of G's mean square; by Woodbury's
    identity `F^-1 g` takes a solve of `history` unknowns, and its direction is given AdamW in g's own length. Meant for a subspace, where gradients are
    small. Source: Das 2024, arXiv 2410.16029, section 3; differs in that the length stays.
    """

    id: ClassVar[str] = "natural-adamw"
    title: ClassVar[str] = "AdamW of gradients divided by the Fisher matrix of the last ones"
    source: ClassVar[Source] = Source(
        "Das", 2024, "Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and Fine-tuning", "2410.16029",
        "section 3",
    )  # fmt: skip
    elementwise: ClassVar[bool] = False
    matrices_only: ClassVar[bool] = True

    history: int = 4
    damping: float = 1.0

    def __post_init__(self) -> None:
        check_range(self.id, "history", self.history, "from 1 to 64", 1 <= self.history <= 64)
        check_range(self.id, "damping", self.damping, "above 0", self.damping > 0)

    def moments(self, shape: tuple[int, ...]) -> tuple[Moment, ...]:
        return (*super().moments(shape), Moment("gradients", (self.history, *shape), signed=True, coded=False))

    def update(
        self, grad: torch.Tensor, moments: Mapping[str, torch.Tensor], begun: int, group: Mapping[str, Any]
    ) -> Update:
        last = moments["gradients"]
        last[(begun - 1) % self.history] = grad
        return super().update(self._natural(grad, last), moments, begun, group)

    def _natural(self, grad: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """`(rank, long)` of `(rank, long)` and `(history, rank, long)`."""
        import torch

        columns = last.flatten(1).float()  # G^T
        gram = columns @ columns.T
        damping = self.damping * gram.diagonal().mean().clamp(min=1e-30)
        shares = torch.linalg.solve(
            gram + damping * torch.eye(len(gram), device=gram.device), columns @ grad.flatten().float()
        )
        natural = grad.float() - (shares @ columns).view_as(grad)
        return natural.mul_(grad.float().norm() / natural.norm().clamp(min=1e-30)).to(grad.dtype)
