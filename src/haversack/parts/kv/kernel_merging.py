"""Merging by a Gaussian kernel: freed tokens go into the kept ones with the nearest keys, the less the further away they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.kv.base import Demote
from haversack.parts.kv.merging import fold, nearest_kept

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class KernelMerge(Demote):
    """Fold a freed token into the kept one with the most similar key (by cosine), if they are at least `threshold` alike; else it is dropped.

    A kept token weighs 1 and a freed one exp(-d^2 / 2 s^2), d the distance of their keys and s the mean such distance among the tokens that are folded
    together. Bytes: none. Error: none known. A threshold above 1 drops everything, to the bit. Sinks take nothing in. Differs from the source in that
    sets are found around kept tokens, when others are freed, where the source merges runs of neighbours that are alike.
    """

    id: ClassVar[str] = "kv.kernel-merge"
    title: ClassVar[str] = "Freed tokens, folded into kept ones by a Gaussian kernel of their keys' distance"
    source: ClassVar[Source | None] = Source(
        "Wang et al.", 2024, "Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks", "2407.08454", "section 4"
    )  # fmt: skip
    merges: ClassVar[bool] = True

    threshold: float = 0.75

    def __post_init__(self) -> None:
        check_range(self.id, "threshold", self.threshold, "above -1 and at most 2", -1 < self.threshold <= 2)

    @property
    def label(self) -> str:
        return f"rest merged by a kernel from {self.threshold:g} on"

    def merge(
        self,
        kept: tuple[torch.Tensor, torch.Tensor],
        freed: tuple[torch.Tensor, torch.Tensor],
        open_to: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor],
        importance: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        likeness, places = nearest_kept(kept[0], freed[0], open_to)
        alike = (likeness >= self.threshold).float()
        beside = kept[0].gather(2, places[..., None].expand_as(freed[0]))
        distance = (freed[0] - beside).square_().sum(-1).sqrt_()
        total, count = (open_to.new_zeros(open_to.shape, dtype=distance.dtype) for _ in range(2))
        total.scatter_add_(2, places, distance * alike)
        count.scatter_add_(2, places, alike)
        width = (total / count.clamp_min_(1)).gather(2, places).clamp_min_(1e-6)
        weight = alike * (-(distance / width).square_() / 2).exp_()
        return fold(kept, freed, places, weight, own_weight=1.0)
