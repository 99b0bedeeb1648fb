"""Merging into anchors: tokens that no head keeps are averaged into the kept ones that stand nearest to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source
from haversack.parts.kv.base import Demote

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AnchorMerge(Demote):
    """Fold a freed token's value into that of the kept one that stands nearest in the text: the mean of all that is folded together, by their importance.

    Bytes: none. Error: none known. Keys stay as they are, and sinks take nothing in. Differs from the source in that keys are not averaged, which are rotated by their
    positions, in that values weigh as much as they were attended to, and that tokens are folded a block at a time.
    """

    id: ClassVar[str] = "kv.anchor-merge"
    title: ClassVar[str] = "Freed tokens' values, averaged into the kept ones that stand nearest"
    source: ClassVar[Source | None] = Source(
        "Liu et al.", 2024, "Efficient Inference of Vision Instruction-Following Models with Elastic Cache", "2407.18121", "section 3"
    )  # fmt: skip
    merges: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return "rest merged into its neighbours"

    def merge(
        self,
        kept: tuple[torch.Tensor, torch.Tensor],
        freed: tuple[torch.Tensor, torch.Tensor],
        open_to: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor],
        importance: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        distance = (positions[1][..., None] - positions[0][:, :, None]).abs_()
        places = distance.masked_fill_(~open_to[:, :, None, :], torch.iinfo(distance.dtype).max).argmin(-1)
        total = importance[0].scatter_add(2, places, importance[1]).clamp_min_(1e-12)
        values = kept[1] * (importance[0] / total)[..., None]
        share = (importance[1] / total.gather(2, places))[..., None]
        values.scatter_add_(2, places[..., None].expand_as(freed[1]), freed[1] * share)
        taken = torch.zeros_like(open_to).scatter_(2, places, True)
        return kept[0], torch.where(taken[..., None], values, kept[1])
