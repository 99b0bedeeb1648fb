"""Nothing held: the cache of a layer whose attention is dropped, so that what it gives is never looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source
from haversack.parts.kv.base import Attending, KVLayer, Regions, Represent
from haversack.parts.kv.rows import SlabLayer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class NothingKV(Represent):
    """Stores no byte; attention gives zeros.

    For layers whose output matrix is dropped, where the rest of attention changes nothing: planners take it only there. Error: none
    beside the dropped matrix's. Source: He et al. 2024 (arXiv 2406.15786, section 3).
    """

    id: ClassVar[str] = "kv.nothing"
    title: ClassVar[str] = "No keys and values, where a layer's attention is dropped"
    source: ClassVar[Source | None] = Source(
        "He, Sun, Shen, Li",
        2024,
        "What Matters in Transformers? Not All Attention is Needed",
        "2406.15786",
        "section 3",
    )

    def stored(self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str) -> tuple[StoredTensor, ...]:
        return ()

    def workspace_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, new_tokens: int, dtype: str
    ) -> int:
        """The log-sum-exp."""
        return DTYPE_BYTES["F32"] * batch_size * site.num_heads * new_tokens

    def kernel_name(self, site: AttentionSite, regions: Regions, *, dtype: str) -> str:
        return "zeros"

    def build(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str, device: str | torch.device
    ) -> KVLayer:
        def rebuild(rows: int) -> KVLayer:
            return self.build(site, regions, batch_size=rows, dtype=dtype, device=device)

        return EmptyLayer(site, regions, batch_size=batch_size, declared=(), tensors={}, rebuild=rebuild)


class EmptyLayer(SlabLayer):
    """Counts tokens, so that positions stay right, and holds none."""

    counters = ("counts",)

    def held_positions(self, row: int) -> tuple[int, ...]:
        return ()

    def append(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None = None) -> None:
        new = [keys.shape[2]] * self.batch_size if real is None else [int(n) for n in real.sum(-1)]
        self.counts = [count + n for count, n in zip(self.counts, new, strict=True)]

    def _attend(
        self, query: torch.Tensor, new_keys: torch.Tensor | None, new_values: torch.Tensor | None, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        output = query.new_zeros(*query.shape[:3], self.site.value_head_dim)
        lse = torch.full(query.shape[:3], -torch.inf, device=query.device)
        return output, lse

    def check_crop(self, num_tokens: int) -> None:
        """Any tokens can be forgotten: none is held."""

    def _forget(self, num_tokens: int) -> None:
        self.counts = [max(0, count - num_tokens) for count in self.counts]
