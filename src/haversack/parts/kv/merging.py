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
        self,
        kept: tuple[torch.Tensor, torch.Tensor],
        freed: tuple[torch.Tensor, torch.Tensor],
        open_to: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor],
        importance: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        likeness, places = nearest_kept(kept[0], freed[0], open_to)
        weight = torch.where(likeness >= self.threshold, likeness.exp(), 0.0)
        return fold(kept, freed, places, weight, own_weight=torch.e)


def nearest_kept(
    kept_keys: torch.Tensor, freed_keys: torch.Tensor, open_to: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each freed token, the cosine of its key with that of the kept one most like it, and that one's place: `(rows, kv_heads, freed)`."""
    import torch

    own = torch.nn.functional.normalize(kept_keys, dim=-1)
    likeness = torch.nn.functional.normalize(freed_keys, dim=-1) @ own.transpose(-1, -2)
    nearest = likeness.masked_fill_(~open_to[:, :, None, :], -2.0).max(-1)
    return nearest.values, nearest.indices


def fold(
    kept: tuple[torch.Tensor, torch.Tensor],
    freed: tuple[torch.Tensor, torch.Tensor],
    places: torch.Tensor,
    weight: torch.Tensor,
    *,
    own_weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept keys and values as means of themselves and of what is folded into them; untouched, to the bit, where nothing of any weight is."""
    import torch

    total = torch.full(kept[0].shape[:3], own_weight, device=weight.device).scatter_add_(2, places, weight)
    merged = []
    for mine, theirs in zip(kept, freed):
        index = places[..., None].expand_as(theirs)
        added = (mine * own_weight).scatter_add_(2, index, theirs * weight[..., None])
        merged.append(torch.where(total[..., None] > own_weight, added / total[..., None], mine))
    return merged[0], merged[1]
