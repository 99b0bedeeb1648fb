"""Fewer key channels: of every group of tokens that leaves the recent window, those that the latest queries use least are left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.kv.attention import BLOCKWISE
from haversack.parts.kv.base import Attending, KVLayer, PackedGroups, Regions, Represent
from haversack.parts.kv.layer import RingLayer
from haversack.parts.kv.packing import pack, row_bytes, unpack
from haversack.parts.kv.plain import PlainGroups
from haversack.parts.kv.projected import narrower
from haversack.parts.kv.quantized import BITS, GROUP_SIZES, QuantizedGroups, QuantizedKV
from haversack.parts.kv.slabs import allocate, plain_slabs

if TYPE_CHECKING:
    import torch

MEMORY = 31 / 32
"""What is left of a query's weight when the next one comes: as many queries count as the source's observation window has."""


@dataclass(frozen=True)
class FewerKeyChannels(Represent):
    """Leave `pruned_share` of the channels of older keys out, each KV head's own in each group of `group_size` tokens: those where the group's keys and the latest
    queries have the least energy, so that the logits' error is least in the sum of squares that a channel has at most.

    Bytes beyond the recent window, per token and KV head, with D channels of which n are kept: 2 n + 2 D, or with `bits` those of `kv.per-channel-keys` at these
    widths; and D / 8 per group and head for a bit map, 4 D per sequence and head for the queries' energy. Error: what left out channels add to the logits; none
    at share 0. Queries up to the one that moves a group out of the window count for it, the later the more, so that no window of them is held and the prefill's chunks decide nothing. Attention is blockwise. Differs from the source in that channels are chosen group
    by group as tokens leave the window, so that no prompt is ever held in full, and that queries of all heads of a group count together.
    """

    id: ClassVar[str] = "kv.fewer-key-channels"
    title: ClassVar[str] = "Older keys without the channels that the latest queries use least"
    source: ClassVar[Source | None] = Source(
        "Xu et al.", 2024, "ThinK: Thinner Key Cache by Query-Driven Pruning", "2407.21018", "section 3"
    )

    pruned_share: float = 0.4
    group_size: int = 64
    recent_tokens: int = 32
    bits: int = 0

    def __post_init__(self) -> None:
        check_range(self.id, "pruned_share", self.pruned_share, "0 or more and below 1", 0 <= self.pruned_share < 1)
        check_range(self.id, "group_size", self.group_size, "32 or 64", self.group_size in GROUP_SIZES)
        check_range(self.id, "recent_tokens", self.recent_tokens, "0 or more", self.recent_tokens >= 0)
        check_range(self.id, "bits", self.bits, "8, 4, 2, or 0 for the model's dtype", self.bits in (0, *BITS))

    @property
    def label(self) -> str:
        packed = f" at {self.bits} bits" if self.bits else ""
        return (
            f"keys without {self.pruned_share:.4g} of their channels{packed} g{self.group_size} +{self.recent_tokens}"
        )

    def kept_channels(self, site: AttentionSite) -> int:
        return site.key_head_dim - int(self.pruned_share * site.key_head_dim)

    @property
    def _packed(self) -> QuantizedKV:
        return QuantizedKV(self.bits or 8, self.bits or 8, self.group_size, self.recent_tokens)

    def _thin(self, site: AttentionSite) -> AttentionSite:
        return narrower(site, site.num_kv_heads, self.kept_channels(site), site.value_head_dim)

    def stored(self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str) -> tuple[StoredTensor, ...]:
        ring_tokens, num_groups = self._packed.split(regions)
        plain = plain_slabs(site, batch_size, regions.sink_tokens + ring_tokens, dtype)
        if not num_groups:
            return plain
        thin, leading = self._thin(site), (batch_size, site.num_kv_heads)
        if self.bits:
            groups = self._packed.stored_groups(thin, batch_size, num_groups)
        else:
            slabs = plain_slabs(thin, batch_size, num_groups * self.group_size, dtype)
            groups = tuple(slab.prefixed("thin") for slab in slabs)
        return (
            *plain,
            *groups,
            StoredTensor("kept_channels", "U8", (*leading, num_groups, row_bytes(site.key_head_dim, 1))),
            StoredTensor("query_energy", "F32", (*leading, 1, site.key_head_dim)),
        )

    def workspace_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, new_tokens: int, dtype: str
    ) -> int:
        """Attending as to packed groups, with thin keys beside whole ones and places of channels; or the new queries' squares; or packing."""
        sizes = {"batch_size": batch_size, "new_tokens": new_tokens, "dtype": dtype}
        if not self._packed.split(regions)[1]:
            return self._packed.workspace_bytes(site, regions, **sizes)  # type: ignore[arg-type]
        heads, f32, i64 = batch_size * site.num_kv_heads, DTYPE_BYTES["F32"], 8
        inside = self._packed.blockwise_bytes(site, regions, **sizes)  # type: ignore[arg-type]
        block_tokens, groups = self._packed.blocks(regions, new_tokens)
        reading = heads * (
            block_tokens * 2 * site.key_head_dim * f32 + groups * site.key_head_dim * (4 * i64 + 2 * f32)
        )
        squares = batch_size * site.num_heads * new_tokens * site.key_head_dim * 2 * f32
        packing = heads * 256 * (2 * site.key_head_dim + site.value_head_dim) * 4 * f32
        return max(inside + reading, inside + squares, packing)

    def kernel_name(self, site: AttentionSite, regions: Regions, *, dtype: str) -> str:
        return BLOCKWISE if self._packed.split(regions)[1] else self._packed.kernel_name(site, regions, dtype=dtype)

    def build(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str, device: str | torch.device
    ) -> KVLayer:
        ring_tokens, num_groups = self._packed.split(regions)
        declared = self.stored(site, regions, batch_size=batch_size, dtype=dtype)
        tensors = allocate(declared, device)
        inside: PackedGroups
        if self.bits:
            inside = QuantizedGroups(self._packed, self._thin(site), num_groups, tensors)
        elif num_groups:
            inside = PlainGroups(tensors["thin.keys"], tensors["thin.values"], self.group_size)
        kind = ThinRing if num_groups else RingLayer
        return kind(
            site,
            regions,
            batch_size=batch_size,
            ring_tokens=ring_tokens,
            declared=declared,
            tensors=tensors,
            rebuild=lambda rows: self.build(site, regions, batch_size=rows, dtype=dtype, device=device),
            packed=ThinGroups(inside, site.key_head_dim, self.kept_channels(site), tensors) if num_groups else None,
            plain_tokens=self.recent_tokens,
        )


class ThinRing(RingLayer):
    """A ring that remembers how much energy the latest queries had in each channel."""

    learns = True

    def _step(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result = self._attend(query, keys, values, how)
        query, counts, since = query.detach(), self.counts, self.real_since_padding
        if how.real is None and len(set(counts)) == 1:
            for piece in self._pieces(keys.shape[2]):
                self._learn(query[:, :, piece], None)
                self.append(keys[:, :, piece], values[:, :, piece])
            return result
        for real in self._masks(keys.shape[2], how.real):
            self._learn(query, real)
            self.append(keys, values, real)
        whole = [seen - before == keys.shape[2] for seen, before in zip(self.counts, counts)]
        self.real_since_padding = [n + keys.shape[2] if one else 0 for n, one in zip(since, whole)]
        return result

    def _pieces(self, num_new: int) -> list[slice]:
        """New tokens up to each that makes a group leave: whatever the chunks, the queries before that choose the group's channels."""
        first = self._until_a_group_leaves(self.counts[0])
        edges = [0, *range(first, num_new, self.group_tokens), num_new]
        return [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]

    def _masks(self, num_new: int, real: torch.Tensor | None) -> Iterator[torch.Tensor]:
        """The same where rows stand differently: `(batch, new_tokens)`, each row's own pieces."""
        import torch

        is_real = torch.ones(self.batch_size, num_new, dtype=torch.bool) if real is None else real
        first = torch.tensor([self._until_a_group_leaves(count) for count in self.counts], device=is_real.device)
        piece = (is_real.cumsum(-1) - 1 - first[:, None]).div(self.group_tokens, rounding_mode="floor") + 1
        for i in range(int(piece.max()) + 1):
            yield is_real & (piece == i)

    @property
    def group_tokens(self) -> int:
        assert self.packed is not None
        return self.packed.group_tokens

    def _until_a_group_leaves(self, count: int) -> int:
        """Tokens from 1 on after which a row of `count` tokens moves a group out of its ring, were it there."""
        return self.group_tokens - (count - self.regions.sink_tokens - self.plain_tokens) % self.group_tokens

    def _learn(self, query: torch.Tensor, real: torch.Tensor | None) -> None:
        """Of every KV head: the mean of its queries' squares, weighed by MEMORY^age, padding left out."""
        import torch

        energy = self.tensors["query_energy"]
        batch_size, _, num_queries, head_dim = query.shape
        seen = torch.ones(batch_size, num_queries, device=query.device) if real is None else real.float()
        later = seen.sum(-1, keepdim=True) - seen.cumsum(-1)
        weights = ((1 - MEMORY) * MEMORY**later * seen)[:, None, None, :]
        squares = query.float().square().view(batch_size, self.site.num_kv_heads, -1, num_queries, head_dim).sum(2)
        energy.mul_(MEMORY ** seen.sum(-1)[:, None, None, None]).add_(weights @ squares)

    def used_slots(self, name: str) -> int:
        return 1 if name == "query_energy" else super().used_slots(name)

    def reset(self) -> None:
        super().reset()
        self.tensors["query_energy"].zero_()


class ThinGroups(PackedGroups):
    """Groups whose keys `inside` holds without some channels, which are read as zeros."""

    def __init__(self, inside: PackedGroups, head_dim: int, kept_channels: int, tensors: dict[str, torch.Tensor]):
        self.inside = inside
        self.tensors = tensors
        self.group_tokens, self.num_groups = inside.group_tokens, inside.num_groups
        self.head_dim, self.kept_channels = head_dim, kept_channels

    def write(self, rows: slice, first_slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        import torch

        x = keys.float().unflatten(2, (-1, self.group_tokens))  # (rows, kv_heads, groups, group_tokens, head_dim)
        asked = self.tensors["query_energy"][rows]
        asked = torch.where(asked.sum(-1, keepdim=True) > 0, asked, 1.0)  # nobody asked yet
        energy = x.square().sum(3).mul_(asked)
        kept = torch.zeros_like(energy).scatter_(-1, energy.topk(self.kept_channels, dim=-1).indices, 1.0)
        self.tensors["kept_channels"][rows, :, first_slot : first_slot + x.shape[2]] = pack(kept.to(torch.uint8), 1)
        thin = x.gather(4, self._places(kept, x)).flatten(2, 3)
        self.inside.write(rows, first_slot, thin, values)

    def read(self, first_slot: int, last_slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        thin, values = self.inside.read(first_slot, last_slot)
        kept = unpack(self.tensors["kept_channels"][:, :, first_slot:last_slot], 1, self.head_dim)
        thin = thin.unflatten(2, (-1, self.group_tokens))
        whole = thin.new_zeros((*thin.shape[:-1], self.head_dim))
        return whole.scatter_(4, self._places(kept, thin), thin).flatten(2, 3), values

    def _places(self, kept: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Numbers of the kept channels, ascending, for every token of a group."""
        places = kept.argsort(dim=-1, descending=True, stable=True)[..., : self.kept_channels]
        return places[:, :, :, None].expand(-1, -1, -1, x.shape[3], -1)
