"""Far values: keys stay on the device and say which tokens matter; values lie on another tier, and a step fetches those of few tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.ledger import DTYPE_BYTES
from haversack.parts.base import Source
from haversack.parts.kv.attention import as_block
from haversack.parts.kv.base import KEY_BLOCK_TOKENS, Regions
from haversack.parts.kv.retrieval import RetrievedGroups, Retrieving

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FarValues(Retrieving):
    """Hold keys on the device and, behind a recent window, values on another tier; of these each KV head fetches `read_tokens` per step, those whose keys
    get the most attention from the step's queries.

    With keys of low rank (`kv.low-rank` in front), queries meet the keys' directions, and no key is ever made again. Bytes on the device, per token and KV head: its key; and the window's values. On the
    tier: a value per token behind the window. Over the link: `read_tokens` values per KV head and step, and each token's value once when it leaves the window. Error: what
    unread tokens would have added, at most their share of the attention times the spread of values; none while no more tokens lie behind the window than are read.
    Differs from the source in that tokens are chosen by their own low-rank keys instead of by the mean key of eight of them, so that no metadata is stored, and that bases are calibrated, not a prompt's own.
    """

    id: ClassVar[str] = "kv.far-values"
    title: ClassVar[str] = "Keys on the device, values on another tier, a fixed number fetched per step"
    source: ClassVar[Source | None] = Source(
        "Sun et al.", 2024, "ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference", "2410.21465", "section 4"
    )  # fmt: skip
    far: ClassVar[tuple[str, ...]] = ("values",)

    @property
    def label(self) -> str:
        return f"values on {self.tier}, {self.read_tokens} read per step g{self.group_size} +{self.recent_tokens}"

    def link_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, held_tokens: int, dtype: str
    ) -> int:
        behind = self.num_groups(regions) * self.group_size
        tokens = min(self.read_tokens, behind, held_tokens) + (self.group_size if behind else 0)
        return batch_size * site.num_kv_heads * tokens * site.value_head_dim * DTYPE_BYTES[dtype]

    def selection_bytes(self, site: AttentionSite, num_tokens: int, *, batch_size: int, num_queries: int) -> int:
        """Logits of every token, those of a block beside them, and a block of keys; each token's share, twice, and its place."""
        f32, block = DTYPE_BYTES["F32"], min(KEY_BLOCK_TOKENS, num_tokens)
        rows, heads = batch_size * site.num_heads * num_queries, batch_size * site.num_kv_heads
        logits = rows * (num_tokens + block + 4) * f32 + heads * (block * site.key_head_dim * f32 + num_tokens)
        return logits + heads * num_tokens * (2 * f32 + 8)

    def indexing_bytes(self, site: AttentionSite, *, batch_size: int) -> int:
        return 0

    def groups(self, site: AttentionSite, num_groups: int, tensors: dict[str, torch.Tensor]) -> RetrievedGroups:
        return _ByKeys(self, num_groups, tensors)


class _ByKeys(RetrievedGroups):
    """Tokens chosen by the attention that their keys get."""

    def chosen(
        self, query: torch.Tensor, until: torch.Tensor, weights: torch.Tensor | None, softcap: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        slab, used = self.tensors["behind.keys"], int(until.max())
        logits = query.new_empty((*query.shape[:3], used))
        for first in range(0, used, KEY_BLOCK_TOKENS):
            at = slice(first, min(first + KEY_BLOCK_TOKENS, used))
            logits[..., at] = query @ as_block(slab[:, :, at]).mT
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        logits.masked_fill_(torch.arange(used, device=query.device) >= until[..., None], -torch.inf)
        share = logits.sub_(logits.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)).exp_()
        share.div_(share.sum(-1, keepdim=True).clamp_min_(1e-30))
        if weights is not None:
            share.mul_(weights)
        received = share.sum(2).masked_fill_(torch.arange(used, device=query.device) >= until, -1.0)
        places = received.topk(self.part.read_tokens, dim=-1, sorted=False).indices
        return places, self.fetch("keys", places)
