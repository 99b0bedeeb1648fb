"""Merging into anchors: tokens that no head keeps are averaged into the kept ones that stand nearest to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source
from haversack.parts.kv.base import Demote
from haversack.parts.kv.merging import fold

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AnchorMerge(Demote):
    """Fold a freed token into the kept one that stands nearest in the text, as the mean of all that is folded together.

    Bytes: none. Error: none known. Sinks take nothing in. Differs from the source in that tokens are folded a block at a time and not once, so that what an anchor
    took in before counts as one token.
    """

    id: ClassVar[str] = "kv.anchor-merge"
    title: ClassVar[str] = "Freed tokens, averaged into the kept ones that stand nearest"
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        distance = (positions[1][..., None] - positions[0][:, :, None]).abs_()
        places = distance.masked_fill_(~open_to[:, :, None, :], torch.iinfo(distance.dtype).max).argmin(-1)
        return fold(kept, freed, places, torch.ones_like(places, dtype=freed[0].dtype), own_weight=1.0)
