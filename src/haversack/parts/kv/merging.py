"""Merging: tokens that no head keeps are folded into the kept tokens whose keys are most like theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.kv.base import Demote

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Merge(Demote):
    """Fold a freed token into the kept one with the nearest key (by cosine), if they are at least `threshold` alike; else it is dropped.

    A kept token becomes the mean of itself and what is folded into it, weighted by e and by exp(cosine), so that its own weight is the
    largest. Bytes: none. Error: none known. A threshold above 1 drops everything, to the bit. Sinks take nothing in. Differs from the source in that the
    threshold is a constant, where the source follows the mean of recent likenesses, and that layers' budgets are not its affair.
    """

    id: ClassVar[str] = "kv.merge"
    title: ClassVar[str] = "Freed tokens, folded into the kept ones that are most like them"
    source: ClassVar[Source | None] = Source(
        "Wan et al.", 2024, "D2O: Dynamic Discriminative Operations for Efficient Generative Inference of Large Language Models", "2406.13035"
    )  # fmt: skip

    threshold: float = 0.6

    def __post_init__(self) -> None:
        check_range(self.id, "threshold", self.threshold, "above -1 and at most 2", -1 < self.threshold <= 2)

    @property
    def label(self) -> str:
        return f"rest merged from {self.threshold:g} on"

    merges: ClassVar[bool] = True

    def merge(
        self, kept: tuple[torch.Tensor, torch.Tensor], freed: tuple[torch.Tensor, torch.Tensor], open_to: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        own = torch.nn.functional.normalize(kept[0], dim=-1)
        likeness = torch.nn.functional.normalize(freed[0], dim=-1) @ own.transpose(-1, -2)
        nearest = likeness.masked_fill_(~open_to[:, :, None, :], -2.0).max(-1)  # (rows, kv_heads, freed)
        weight = torch.where(nearest.values >= self.threshold, nearest.values.exp(), 0.0)
        total = torch.full_like(open_to, torch.e, dtype=torch.float32).scatter_add_(2, nearest.indices, weight)
        merged = []
        for mine, theirs in zip(kept, freed):
            index = nearest.indices[..., None].expand_as(theirs)
            added = (mine * torch.e).scatter_add_(2, index, theirs * weight[..., None])
            merged.append(torch.where(total[..., None] > torch.e, added / total[..., None], mine))
        return merged[0], merged[1]
