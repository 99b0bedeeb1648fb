"""Pages: everything is held, and a step reads as many pages as ever, those whose keys may matter most to its queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.kv.attention import BLOCKWISE, as_block, attend_blocks, attention_workspace_bytes
from haversack.parts.kv.base import KEY_BLOCK_TOKENS_PREFILL, Attending, KVLayer, Regions, Represent
from haversack.parts.kv.layer import RingLayer
from haversack.parts.kv.plain import PlainKV
from haversack.parts.kv.slabs import allocate

if TYPE_CHECKING:
    import torch

    from haversack.parts.kv.attention import Block

BOUND_QUERIES = 32
"""Queries whose bounds are made at a time."""

RECENT_PAGES = 2
"""Read whatever they hold: the page that is being filled and the one before it. So is the first, with the sinks."""


@dataclass(frozen=True)
class PagedKV(Represent):
    """Hold every token in the model's dtype, and of each page of `page_tokens` tokens the least and the largest key in each channel; a step reads `read_pages` pages and its own tokens.

    Of each KV head the first page and the last two are read, and of the others those with the highest bound on a logit, the largest over the step's queries of that head: a channel adds at most q times the largest
    key, or the least where q is negative. A prompt's chunk reads as many pages, for all its queries together.

    Bytes: those of `kv.plain`, and two keys per page. Read at a step: `read_pages * page_tokens` tokens per head at any length, and the bounds. Error: what unread pages would have
    added; none while the context has no more pages than are read. Where old tokens are dropped, everything held is read. Differs from the source in that pages have one size, and in that they are chosen
    anew at every step.
    """

    id: ClassVar[str] = "kv.pages"
    title: ClassVar[str] = "Every token held, a fixed number of pages read per step"
    source: ClassVar[Source | None] = Source(
        "Yang et al.", 2025, "LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention", "2502.14866", "section 3.4"
    )  # fmt: skip

    page_tokens: int = 32
    read_pages: int = 16

    def __post_init__(self) -> None:
        check_range(self.id, "page_tokens", self.page_tokens, "4 or more", self.page_tokens >= 4)
        least = RECENT_PAGES + 2
        check_range(self.id, "read_pages", self.read_pages, f"{least} or more", self.read_pages >= least)

    @property
    def label(self) -> str:
        return f"{self.read_pages} pages of {self.page_tokens} read per step"

    def _num_pages(self, regions: Regions) -> int:
        """Pages there are; 0 where all that is held is read anyway."""
        pages = -(-regions.total_tokens // self.page_tokens)
        return 0 if regions.drops or pages <= self.read_pages else pages

    def stored(self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str) -> tuple[StoredTensor, ...]:
        plain = PlainKV().stored(site, regions, batch_size=batch_size, dtype=dtype)
        num_pages = self._num_pages(regions)
        shape = (batch_size, site.num_kv_heads, num_pages, site.key_head_dim)
        bounds = (StoredTensor("page_least", dtype, shape), StoredTensor("page_largest", dtype, shape))
        return (*plain, *bounds) if num_pages else plain

    def workspace_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, new_tokens: int, dtype: str
    ) -> int:
        """As `kv.plain` by blocks while few tokens are there; or the queries' bounds and the pages that they read; and the bounds of new pages."""
        sizes = {"batch_size": batch_size, "new_tokens": new_tokens, "dtype": dtype}
        num_pages = self._num_pages(regions)
        plain = PlainKV().workspace_bytes(site, regions, **sizes)  # type: ignore[arg-type]
        if not num_pages:
            return plain
        f32, own, heads = DTYPE_BYTES["F32"], DTYPE_BYTES[dtype], batch_size * site.num_kv_heads
        queries = min(new_tokens, BOUND_QUERIES)
        bounds = batch_size * site.num_heads * queries * (num_pages * 2 + 3 * site.key_head_dim) * f32
        bounds += heads * num_pages * (2 * site.key_head_dim * f32 + 4 * f32 + 3 * 8)
        filling = heads * (new_tokens + 2 * self.page_tokens) * site.key_head_dim * own
        tokens, head_dims = self.read_pages * self.page_tokens, site.key_head_dim + site.value_head_dim
        reading = attention_workspace_bytes(
            batch_size=batch_size,
            num_heads=site.num_heads,
            num_kv_heads=site.num_kv_heads,
            key_head_dim=site.key_head_dim,
            value_head_dim=site.value_head_dim,
            num_queries=new_tokens,
            block_tokens=tokens,
            block_bytes=heads * tokens * (head_dims * (f32 + own) + 3 * 8 + min(new_tokens, 512)),
        )
        return max(plain, bounds, reading) + filling

    def kernel_name(self, site: AttentionSite, regions: Regions, *, dtype: str) -> str:
        return BLOCKWISE if self._num_pages(regions) else PlainKV().kernel_name(site, regions, dtype=dtype)

    def build(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str, device: str | torch.device
    ) -> KVLayer:
        if not self._num_pages(regions):
            return PlainKV().build(site, regions, batch_size=batch_size, dtype=dtype, device=device)
        declared = self.stored(site, regions, batch_size=batch_size, dtype=dtype)
        layer = PagedLayer(
            site,
            regions,
            batch_size=batch_size,
            ring_tokens=regions.recent_tokens,
            declared=declared,
            tensors=allocate(declared, device),
            rebuild=lambda rows: self.build(site, regions, batch_size=rows, dtype=dtype, device=device),
        )
        layer.part = self
        return layer


class PagedLayer(RingLayer):
    """Slabs that never wrap, and the bounds of their pages."""

    learns = True
    part: PagedKV
    read_tokens: int = 0
    """Stored tokens that each head read at the last step."""

    def used_slots(self, name: str) -> int:
        slots = max(self.counts)
        return slots if name in ("keys", "values") else -(-slots // self.part.page_tokens)

    def _write(self, rows: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        size, count = self.part.page_tokens, self.counts[rows.start]
        super()._write(rows, keys, values)
        end = count + keys.shape[2]
        whole = end // size
        for first, last, stop in ((count // size, whole, whole * size), (whole, whole + 1, end)):
            if first * size < stop:  # whole pages, then the one that is being filled
                page = self.tensors["keys"][rows, :, first * size : stop].unflatten(2, (last - first, -1))
                self.tensors["page_least"][rows, :, first:last] = page.amin(3)
                self.tensors["page_largest"][rows, :, first:last] = page.amax(3)

    def _attend(
        self, query: torch.Tensor, new_keys: torch.Tensor | None, new_values: torch.Tensor | None, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        if max(self.counts) <= self.part.read_pages * self.part.page_tokens:
            return super()._attend(query, new_keys, new_values, how)
        pages = self._chosen(query, how.real)
        counts = torch.tensor(self.counts, dtype=torch.int32, device=query.device)[:, None]
        real = torch.ones_like(counts, dtype=torch.bool).expand(-1, query.shape[2]) if how.real is None else how.real
        positions = counts + real.to(torch.int32).cumsum(-1, dtype=torch.int32) - 1

        def blocks(start: int, stop: int) -> Iterator[Block]:
            yield self._read(pages, stop - start)
            if new_keys is not None and new_values is not None:
                size = KEY_BLOCK_TOKENS_PREFILL
                yield from self._new_blocks(new_keys, new_values, positions, how.real, start, stop, size)

        self.read_tokens = self.part.read_pages * self.part.page_tokens
        return attend_blocks(
            query,
            blocks,
            num_kv_heads=self.site.num_kv_heads,
            value_head_dim=self.site.value_head_dim,
            scaling=how.scaling,
            softcap=how.softcap,
            sinks=how.sinks,
        )

    def _chosen(self, query: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """Pages that each KV head reads, `(batch, kv_heads, read_pages)`."""
        import torch

        used = self.used_slots("page_least")
        batch_size, kv_heads = query.shape[0], self.site.num_kv_heads
        bound = torch.full((batch_size, kv_heads, used), -torch.inf, device=query.device)
        largest, least = (self.tensors[f"page_{name}"][:, :, :used].float().mT for name in ("largest", "least"))
        for first in range(0, query.shape[2], BOUND_QUERIES):
            some = slice(first, first + BOUND_QUERIES)
            q = query[:, :, some].detach().float()
            if real is not None:
                q = q * real[:, None, some, None]  # padding asks for nothing
            q = q.reshape(batch_size, kv_heads, -1, q.shape[-1])
            found = (q.clamp_min(0) @ largest).add_(q.clamp_max(0) @ least)
            torch.maximum(bound, found.amax(2), out=bound)
        pages = torch.arange(used, device=query.device)
        last = (torch.tensor(self.counts, device=query.device)[:, None] - 1) // self.part.page_tokens
        always = ((pages == 0) | (pages > last - RECENT_PAGES)) & (pages <= last)
        bound.masked_fill_(always[:, None], torch.inf).masked_fill_((pages > last)[:, None], -torch.inf)
        return bound.topk(self.part.read_pages, dim=-1, sorted=False).indices

    def _read(self, pages: torch.Tensor, num_queries: int) -> Block:
        """Keys and values of the pages' tokens in float32, those that are not there hidden."""
        import torch

        within = torch.arange(self.part.page_tokens, device=pages.device)
        places = (pages[..., None] * self.part.page_tokens + within).flatten(2)  # (batch, kv_heads, tokens)
        counts = torch.tensor(self.counts, device=pages.device)[:, None, None]
        hidden = (places >= counts)[:, :, None].expand(-1, -1, num_queries, -1)
        places = places.clamp_max(self.tensors["keys"].shape[2] - 1)[..., None]
        keys, values = (
            as_block(self.tensors[name].gather(2, places.expand(-1, -1, -1, self.tensors[name].shape[-1])))
            for name in ("keys", "values")
        )
        return keys, values, hidden

    def reset(self) -> None:
        super().reset()
        self.read_tokens = 0
