"""Retrieval: a recent window lies on the device, older tokens partly on another tier, of which a step fetches a fixed number."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import check_range
from haversack.parts.kv.attention import BLOCKWISE, as_block, attention_workspace_bytes
from haversack.parts.kv.base import FEW_QUERIES, KEY_BLOCK_TOKENS, Attending, KVLayer, PackedGroups, Regions, Represent
from haversack.parts.kv.layer import RingLayer
from haversack.parts.kv.plain import PlainKV
from haversack.parts.kv.quantized import QuantizedKV
from haversack.parts.kv.slabs import allocate, plain_slabs

if TYPE_CHECKING:
    import torch

    from haversack.parts.kv.attention import Block

TIERS = ("disk", "host")
GROUP_SIZES = (32, 64)


@dataclass(frozen=True)
class Retrieving(Represent):
    """Tokens leave the recent window in groups of `group_size`; of those behind it, each KV head reads `read_tokens` per step of up to `FEW_QUERIES` tokens, and a
    prompt's chunk all of them, block by block. Where old tokens are dropped, everything held stays on the device as it is."""

    spares_steps: ClassVar[bool] = True
    far: ClassVar[tuple[str, ...]]
    """Which of keys and values lie on the other tier, once they have left the window."""

    read_tokens: int = 256
    recent_tokens: int = 64
    group_size: int = 64
    tier: str = "disk"

    def __post_init__(self) -> None:
        check_range(self.id, "read_tokens", self.read_tokens, "1 or more", self.read_tokens >= 1)
        check_range(self.id, "recent_tokens", self.recent_tokens, "0 or more", self.recent_tokens >= 0)
        check_range(self.id, "group_size", self.group_size, "32 or 64", self.group_size in GROUP_SIZES)
        check_range(self.id, "tier", self.tier, " or ".join(TIERS), self.tier in TIERS)

    def index(self, site: AttentionSite, num_tokens: int, batch_size: int) -> tuple[StoredTensor, ...]:
        """What lies on the device to choose `num_tokens` tokens behind the window by, beside the near ones of keys and values."""
        return ()

    @abstractmethod
    def selection_bytes(self, site: AttentionSite, num_tokens: int, *, batch_size: int, num_queries: int) -> int:
        """The most bytes that choosing between `num_tokens` tokens allocates, what is then read excluded."""

    @abstractmethod
    def indexing_bytes(self, site: AttentionSite, *, batch_size: int) -> int:
        """The most bytes that a piece of tokens takes which leaves the window, beside its copies."""

    @abstractmethod
    def groups(self, site: AttentionSite, num_groups: int, tensors: dict[str, torch.Tensor]) -> RetrievedGroups:
        """The store behind the window."""

    @property
    def _split(self) -> QuantizedKV:
        return QuantizedKV(8, 8, self.group_size, self.recent_tokens)

    def num_groups(self, regions: Regions) -> int:
        """Groups behind the window; 0 where all that is held lies in it."""
        return 0 if regions.drops else self._split.split(regions)[1]

    def stored(self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str) -> tuple[StoredTensor, ...]:
        num_groups = self.num_groups(regions)
        if not num_groups:
            return PlainKV().stored(site, regions, batch_size=batch_size, dtype=dtype)
        num_tokens = num_groups * self.group_size
        window = plain_slabs(site, batch_size, regions.sink_tokens + self._split.split(regions)[0], dtype)
        behind = (slab.prefixed("behind") for slab in plain_slabs(site, batch_size, num_tokens, dtype))
        placed = (
            StoredTensor(
                slab.name, slab.dtype, slab.shape, self.tier if slab.name.split(".")[1] in self.far else "device"
            )
            for slab in behind
        )
        return (*window, *placed, *self.index(site, num_tokens, batch_size))

    def workspace_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, new_tokens: int, dtype: str
    ) -> int:
        """Attending by blocks to everything; or choosing, and attending to what was chosen; or putting tokens away."""
        sizes = {"batch_size": batch_size, "new_tokens": new_tokens, "dtype": dtype}
        num_groups = self.num_groups(regions)
        if not num_groups:
            return PlainKV().workspace_bytes(site, regions, **sizes)  # type: ignore[arg-type]
        f32, own, heads = DTYPE_BYTES["F32"], DTYPE_BYTES[dtype], batch_size * site.num_kv_heads
        head_dims, num_tokens = site.key_head_dim + site.value_head_dim, num_groups * self.group_size
        everything = self._split.blockwise_bytes(site, regions, **sizes)  # type: ignore[arg-type]
        everything += heads * min(KEY_BLOCK_TOKENS, num_tokens) * head_dims * own
        putting_away = heads * 256 * head_dims * 3 * own + self.indexing_bytes(site, batch_size=batch_size)
        if new_tokens > FEW_QUERIES:
            return max(everything, putting_away)
        read = min(self.read_tokens, num_tokens)
        choosing = self.selection_bytes(site, num_tokens, batch_size=batch_size, num_queries=new_tokens)
        queries = batch_size * site.num_heads * new_tokens * site.key_head_dim * 2 * f32
        reading = heads * read * (head_dims * (f32 + own) + 4 * 8 + new_tokens)
        retrieving = attention_workspace_bytes(
            batch_size=batch_size,
            num_heads=site.num_heads,
            num_kv_heads=site.num_kv_heads,
            key_head_dim=site.key_head_dim,
            value_head_dim=site.value_head_dim,
            num_queries=new_tokens,
            block_tokens=read,
            block_bytes=max(choosing + heads * read * 2 * 8, reading) + queries,
        )
        return max(everything, retrieving, putting_away)

    def kernel_name(self, site: AttentionSite, regions: Regions, *, dtype: str) -> str:
        return BLOCKWISE if self.num_groups(regions) else PlainKV().kernel_name(site, regions, dtype=dtype)

    def build(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str, device: str | torch.device
    ) -> KVLayer:
        num_groups = self.num_groups(regions)
        if not num_groups:
            return PlainKV().build(site, regions, batch_size=batch_size, dtype=dtype, device=device)
        declared = self.stored(site, regions, batch_size=batch_size, dtype=dtype)
        tensors = allocate(declared, device)
        layer = RetrievingLayer(
            site,
            regions,
            batch_size=batch_size,
            ring_tokens=self._split.split(regions)[0],
            declared=declared,
            tensors=tensors,
            rebuild=lambda rows: self.build(site, regions, batch_size=rows, dtype=dtype, device=device),
            packed=self.groups(site, num_groups, tensors),
            plain_tokens=self.recent_tokens,
        )
        layer.part = self
        return layer


class RetrievedGroups(PackedGroups):
    """Groups in `behind.keys` and `behind.values`, each on its tier; reads come to the queries' device. `fetched_bytes` counts what came from the other tier."""

    def __init__(self, part: Retrieving, num_groups: int, tensors: dict[str, torch.Tensor]):
        self.part, self.tensors = part, tensors
        self.group_tokens, self.num_groups = part.group_size, num_groups
        self.fetched_bytes = 0

    def write(self, rows: slice, first_slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        at = slice(first_slot * self.group_tokens, first_slot * self.group_tokens + keys.shape[2])
        self.tensors["behind.keys"][rows, :, at] = keys
        self.tensors["behind.values"][rows, :, at] = values

    def read(self, first_slot: int, last_slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        at = slice(first_slot * self.group_tokens, last_slot * self.group_tokens)
        keys, values = (self._come(name, self.tensors[f"behind.{name}"][:, :, at]) for name in ("keys", "values"))
        return keys, values

    def fetch(self, name: str, places: torch.Tensor) -> torch.Tensor:
        """Keys or values in float32 at `places` `(batch, kv_heads, n)`."""
        slab = self.tensors[f"behind.{name}"]
        index = places.to(slab.device)[..., None].expand(-1, -1, -1, slab.shape[-1])
        return self._come(name, slab.gather(2, index))

    def _come(self, name: str, piece: torch.Tensor) -> torch.Tensor:
        if name in self.part.far:
            self.fetched_bytes += piece.numel() * piece.element_size()
        return as_block(piece.to(self.tensors["keys"].device))

    @abstractmethod
    def chosen(
        self, query: torch.Tensor, until: torch.Tensor, weights: torch.Tensor | None, softcap: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of the tokens that each KV head reads, `(batch, kv_heads, n)`, and their keys in float32.

        `query` `(batch, kv_heads, rows, head_dim)` is scaled and float32, `until` `(batch, 1, 1)` is how many tokens each sequence has behind its window, and
        `weights` `(batch, 1, rows, 1)` is 0 where a query is padding (None: nowhere).
        """


class RetrievingLayer(RingLayer):
    """A ring on the device, and behind it a store of which steps of few queries read what is chosen for them."""

    learns = True
    part: Retrieving
    _asking: tuple[torch.Tensor, Attending]

    @property
    def behind(self) -> RetrievedGroups:
        assert isinstance(self.packed, RetrievedGroups)
        return self.packed

    @property
    def fetched_bytes(self) -> int:
        """What came from the other tier since the layer was made."""
        return self.behind.fetched_bytes

    def _make_decoder(self, softcap: float | None = None) -> None:
        return None

    def used_slots(self, name: str) -> int:
        return super().used_slots(name) if name.split(".")[-1] in ("keys", "values") else self.tensors[name].shape[2]

    def _attend(
        self, query: torch.Tensor, new_keys: torch.Tensor | None, new_values: torch.Tensor | None, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._asking = query, how
        try:
            return super()._attend(query, new_keys, new_values, how)
        finally:
            del self._asking

    def _packed_blocks(self, positions: torch.Tensor, size: int, uniform: bool) -> Iterator[Block]:
        query, how = self._asking
        if query.shape[2] > FEW_QUERIES or max(self.packed_until) <= self.part.read_tokens:
            yield from super()._packed_blocks(positions, size, uniform)
        else:
            yield self._retrieved(query.detach(), how)

    def _retrieved(self, query: torch.Tensor, how: Attending) -> Block:
        """What is chosen for these queries, in float32; what is not there is hidden."""
        import torch

        batch_size, num_heads, num_queries, head_dim = query.shape
        groups = num_heads // self.site.num_kv_heads
        q = query.float().mul(how.scaling).reshape(batch_size, self.site.num_kv_heads, groups * num_queries, head_dim)
        until = torch.tensor(self.packed_until, device=query.device)[:, None, None]
        weights = None if how.real is None else how.real[:, None].repeat(1, 1, groups)[..., None]
        places, keys = self.behind.chosen(q, until, weights, how.softcap)
        hidden = (places >= until)[:, :, None].expand(-1, -1, num_queries, -1)
        return keys, self.behind.fetch("values", places), hidden
