"""Across layers: two layers, one behind the other, share the directions of their tokens; each keeps its own lengths, and the tokens where the two differ most."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.errors import PlanError, UsageError
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.kv.attention import BLOCKWISE
from haversack.parts.kv.base import KVLayer, KVOption, PackedGroups, Regions, Represent
from haversack.parts.kv.layer import RingLayer
from haversack.parts.kv.plain import PlainGroups
from haversack.parts.kv.quantized import BITS, GROUP_SIZES, QuantizedGroups, QuantizedKV
from haversack.parts.kv.slabs import allocate, plain_slabs

if TYPE_CHECKING:
    import torch

LARGEST_FLOAT16 = 65504.0


@dataclass(frozen=True)
class DepthMergedKV(Represent):
    """Store the directions of older tokens once for two layers: where `is_deeper`, in the slabs of the layer before.

    When a group of `group_size` tokens leaves the recent window, the first layer stores the directions of its keys and values, in the model's dtype or at `bits` as
    `kv.per-channel-keys` does; the deeper one, right after, turns them towards its own along the arc between the two, by `deeper_share` of the angle. Each keeps the
    lengths in float16. Of each group and head, the `retained_tokens` whose angle is largest are kept by each layer as its own, keys and values apart.

    Bytes of the two layers beyond their windows, per token and KV head, with D channels, groups of g and r retained: 4 D + 8, or with b bits those of `kv.per-channel-keys`
    and 8; and per group and head 2 r + 8 r D. Error: a merged direction is off by its share of the angle; none known for outputs. Retained tokens of the first layer come
    out of its stored directions, so that at few bits they have their error. Attention is blockwise. Differs from the source in that what is
    retained is a number and not a threshold, for bytes to be known; in that tokens are merged by groups as they leave the window and no
    prompt is held in full; and in that directions meet half-way by default, where the source goes 0.6 of the way.
    """

    id: ClassVar[str] = "kv.depth-merged"
    title: ClassVar[str] = "Directions of two layers' tokens merged, lengths and the most different tokens apart"
    source: ClassVar[Source | None] = Source(
        "Liu et al.", 2024, "MiniCache: KV Cache Compression in Depth Dimension for Large Language Models", "2405.14366", "section 4"
    )  # fmt: skip

    is_deeper: bool = False
    bits: int = 0
    group_size: int = 64
    recent_tokens: int = 32
    retained_tokens: int = 4
    deeper_share: float = 0.5

    def __post_init__(self) -> None:
        check_range(self.id, "bits", self.bits, "8, 4, 2, or 0 for the model's dtype", self.bits in (0, *BITS))
        check_range(self.id, "group_size", self.group_size, "32 or 64", self.group_size in GROUP_SIZES)
        check_range(self.id, "recent_tokens", self.recent_tokens, "0 or more", self.recent_tokens >= 0)
        retained = 1 <= self.retained_tokens <= self.group_size
        check_range(self.id, "retained_tokens", self.retained_tokens, "1 to a group's tokens", retained)
        check_range(self.id, "deeper_share", self.deeper_share, "0 to 1", 0 <= self.deeper_share <= 1)

    @property
    def label(self) -> str:
        whose = "the layer before's directions" if self.is_deeper else "directions for two layers"
        packed = f" at {self.bits} bits" if self.bits else ""
        return f"{whose}{packed} g{self.group_size} +{self.recent_tokens}, {self.retained_tokens} retained"

    @property
    def joins(self) -> bool:
        return self.is_deeper

    def check_joined(self, before: KVOption | None) -> None:
        if self.is_deeper and (before is None or before.represent != replace(self, is_deeper=False)):
            found = "there is none" if before is None else f"that one is stored as {before.label!r}"
            raise PlanError(
                f"a layer shares the directions of the layer before it ({self.label}), but {found}; pair the two alike."
            )

    @property
    def _packed(self) -> QuantizedKV:
        return QuantizedKV(self.bits or 8, self.bits or 8, self.group_size, self.recent_tokens)

    def stored(self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str) -> tuple[StoredTensor, ...]:
        ring_tokens, num_groups = self._packed.split(regions)
        plain = plain_slabs(site, batch_size, regions.sink_tokens + ring_tokens, dtype)
        if not num_groups:
            return plain
        tokens, leading = num_groups * self.group_size, (batch_size, site.num_kv_heads)
        out = [*plain]
        if not self.is_deeper and self.bits:
            out += self._packed.stored_groups(site, batch_size, num_groups)
        elif not self.is_deeper:
            out += [slab.prefixed("directions") for slab in plain_slabs(site, batch_size, tokens, dtype)]
        for name, width in (("key", site.key_head_dim), ("value", site.value_head_dim)):
            out.append(StoredTensor(f"{name}_lengths", "F16", (*leading, tokens)))
            out.append(StoredTensor(f"{name}_retained", dtype, (*leading, num_groups, self.retained_tokens, width)))
            if not self.is_deeper:
                out.append(StoredTensor(f"{name}_places", "U8", (*leading, num_groups, self.retained_tokens)))
        return tuple(out)

    def workspace_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, new_tokens: int, dtype: str
    ) -> int:
        """Attending as to packed groups, with lengths and retained tokens of a block; or merging as many as leave the ring at once, in float32."""
        sizes = {"batch_size": batch_size, "new_tokens": new_tokens, "dtype": dtype}
        if not self._packed.split(regions)[1]:
            return self._packed.workspace_bytes(site, regions, **sizes)  # type: ignore[arg-type]
        heads, f32, i64 = batch_size * site.num_kv_heads, DTYPE_BYTES["F32"], 8
        inside = self._packed.blockwise_bytes(site, regions, **sizes)  # type: ignore[arg-type]
        block_tokens, groups = self._packed.blocks(regions, new_tokens)
        widest = max(site.key_head_dim, site.value_head_dim)
        reading = heads * (
            block_tokens * (site.key_head_dim + site.value_head_dim) * f32
            + groups * self.retained_tokens * (widest * f32 + 2 * i64)
        )
        merging = heads * 256 * (2 * (site.key_head_dim + site.value_head_dim) + 9 * widest + 16) * f32
        return max(inside + reading, merging)

    def kernel_name(self, site: AttentionSite, regions: Regions, *, dtype: str) -> str:
        return BLOCKWISE if self._packed.split(regions)[1] else self._packed.kernel_name(site, regions, dtype=dtype)

    def build(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str, device: str | torch.device
    ) -> KVLayer:
        ring_tokens, num_groups = self._packed.split(regions)
        declared = self.stored(site, regions, batch_size=batch_size, dtype=dtype)
        tensors = allocate(declared, device)
        directions: PackedGroups | None = None
        if num_groups and not self.is_deeper:
            if self.bits:
                directions = QuantizedGroups(self._packed, site, num_groups, tensors)
            else:
                directions = PlainGroups(tensors["directions.keys"], tensors["directions.values"], self.group_size)
        return DepthMergedLayer(
            site,
            regions,
            batch_size=batch_size,
            ring_tokens=ring_tokens,
            declared=declared,
            tensors=tensors,
            rebuild=lambda rows: self.build(site, regions, batch_size=rows, dtype=dtype, device=device),
            packed=MergedGroups(self, site, num_groups, tensors, directions) if num_groups else None,
            plain_tokens=self.recent_tokens,
        )


class DepthMergedLayer(RingLayer):
    """One of two layers; the deeper one reads and turns the first one's directions."""

    def join(self, before: KVLayer) -> None:
        mine, its = self.packed, getattr(before, "packed", None)
        if mine is None and its is None:
            return  # a context that is not packed at all
        if not (isinstance(mine, MergedGroups) and isinstance(its, MergedGroups) and mine.pairs_with(its)):
            raise UsageError(
                f"{self.site.id} and {before.site.id} hold different tokens or heads, so that they can't share directions."
            )
        mine.first = its


class MergedGroups(PackedGroups):
    """Groups of lengths and retained tokens; directions and places are the first layer's."""

    def __init__(
        self,
        part: DepthMergedKV,
        site: AttentionSite,
        num_groups: int,
        tensors: dict[str, torch.Tensor],
        directions: PackedGroups | None,
    ):
        self.part, self.site, self.tensors, self.directions = part, site, tensors, directions
        self.group_tokens, self.num_groups = part.group_size, num_groups
        self.first: MergedGroups | None = None if part.is_deeper else self

    def pairs_with(self, before: MergedGroups) -> bool:
        shapes = [[t.shape for name, t in g.tensors.items() if name.endswith("_lengths")] for g in (self, before)]
        alike = self.part == replace(before.part, is_deeper=True) and shapes[0] == shapes[1]
        widths = [(g.site.key_head_dim, g.site.value_head_dim) for g in (self, before)]
        return alike and widths[0] == widths[1]

    def _shared(self) -> tuple[MergedGroups, PackedGroups]:
        if self.first is None or self.first.directions is None:
            raise UsageError(
                f"{self.site.id} shares the directions of the layer before it, which it was not joined with."
            )
        return self.first, self.first.directions

    def write(self, rows: slice, first_slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        first, store = self._shared()
        last_slot = first_slot + keys.shape[2] // self.group_tokens
        before = None if first is self else store.read(first_slot, last_slot)
        merged = []
        for i, (name, x) in enumerate((("key", keys), ("value", values))):
            x = x.float()
            length = x.norm(dim=-1, keepdim=True)
            self._tokens(f"{name}_lengths", first_slot, last_slot)[rows] = length[..., 0].clamp_max(LARGEST_FLOAT16)
            direction = x / length.clamp_min(1e-12)
            if before is None:
                self._retain(name, rows, first_slot, x, None)
            else:
                its = before[i][rows]
                its = its / its.norm(dim=-1, keepdim=True).clamp_min(1e-12)
                cosine = (its * direction).sum(-1).clamp_(-1, 1)
                places = (
                    cosine.unflatten(2, (-1, self.group_tokens))
                    .topk(self.part.retained_tokens, -1, largest=False)
                    .indices
                )
                lengths = first._tokens(f"{name}_lengths", first_slot, last_slot)[rows].float()
                first._retain(name, rows, first_slot, its * lengths[..., None], places)
                self._retain(name, rows, first_slot, x, places)
                direction = on_the_arc(its, direction, cosine[..., None], self.part.deeper_share)
            merged.append(direction)
        store.write(rows, first_slot, merged[0], merged[1])

    def read(self, first_slot: int, last_slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, store = self._shared()
        found = []
        for name, directions in zip(("key", "value"), store.read(first_slot, last_slot)):
            x = directions * self._tokens(f"{name}_lengths", first_slot, last_slot)[..., None]
            grouped = x.unflatten(2, (-1, self.group_tokens))
            places = first.tensors[f"{name}_places"][:, :, first_slot:last_slot, :, None].long()
            retained = self.tensors[f"{name}_retained"][:, :, first_slot:last_slot].float()
            grouped.scatter_(3, places.expand_as(retained), retained)
            found.append(x)
        return found[0], found[1]

    def _tokens(self, name: str, first_slot: int, last_slot: int) -> torch.Tensor:
        return self.tensors[name][:, :, first_slot * self.group_tokens : last_slot * self.group_tokens]

    def _retain(self, name: str, rows: slice, first_slot: int, x: torch.Tensor, places: torch.Tensor | None) -> None:
        """Keep tokens `(rows, kv_heads, tokens, head_dim)` of each group as they are: those in `places`, or, before it is known which, the first."""
        import torch

        grouped = x.unflatten(2, (-1, self.group_tokens))
        if places is None:
            shape = (*grouped.shape[:3], self.part.retained_tokens)
            places = torch.zeros(shape, dtype=torch.int64, device=x.device)
        groups = slice(first_slot, first_slot + grouped.shape[2])
        taken = grouped.gather(3, places[..., None].expand(*places.shape, x.shape[-1]))
        self.tensors[f"{name}_retained"][rows, :, groups] = taken.to(self.tensors[f"{name}_retained"].dtype)
        if not self.part.is_deeper:
            self.tensors[f"{name}_places"][rows, :, groups] = places.to(torch.uint8)


def on_the_arc(one: torch.Tensor, other: torch.Tensor, cosine: torch.Tensor, share: float) -> torch.Tensor:
    """The direction that lies `share` of the way from one unit vector to another, along the arc between them (Shoemake 1985, spherical interpolation)."""
    import torch

    angle = torch.acos(cosine.clamp(-1 + 1e-6, 1 - 1e-6))
    sine = angle.sin()
    return one * (((1 - share) * angle).sin() / sine) + other * ((share * angle).sin() / sine)
