"""Few bits by tables: keys as they were before rotation, values of a calibrated table, the numbers furthest out kept apart."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.kv.attention import BLOCKWISE
from haversack.parts.kv.base import KVLayer, PackedGroups, Regions, Represent
from haversack.parts.kv.layer import RingLayer
from haversack.parts.kv.packing import SMALLEST_SCALE, pack, row_bytes, unpack
from haversack.parts.kv.quantized import GROUP_SIZES, QuantizedKV
from haversack.parts.kv.slabs import allocate, plain_slabs

if TYPE_CHECKING:
    import torch

BITS = (2, 3, 4)
MAX_HEAD_DIM = 256
"""A place in a vector is stored in a byte."""


@dataclass(frozen=True)
class NonUniformKV(Represent):
    """Pack all but the first token and the most recent ones to `bits` per number, as codes of a table's values times a scale plus a zero.

    Keys have one scale and zero per channel and group of `group_size` tokens, after each token was turned back to its group's first by the rotary embedding
    (`before_rotation`; where a site's rotation is not known they stay as they are); values one per token. The `num_outliers` numbers of each such vector that
    are furthest from its mean are stored as they are. `key_table` and `value_table` have 2^bits values each for vectors of mean 0 and deviation 1
    (default: Max's for a normal distribution); scale and zero are those of least squares under the table.

    Bytes beyond the recent window, per token and KV head, with D channels, b bits, groups of g and n outliers: keys ceil(D b / 8) + D (4 + 3 n) / g, values
    ceil(D b / 8) + 4 + 3 n; and two tables of 2^b floats per layer and sequence. Error: none known. Attention is blockwise. Differs from the source in that
    a key is turned to its group's first token instead of position 0, which leaves the same means and needs no positions; in that scales are the group's own
    and none is calibrated; and in that scale and zero are fitted at every width, where the source corrects mean and deviation at 2 bits.
    """

    id: ClassVar[str] = "kv.non-uniform"
    title: ClassVar[str] = "Keys before rotation and values by calibrated tables, outliers of each vector apart"
    source: ClassVar[Source | None] = Source(
        "Hooper et al.", 2024, "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization", "2401.18079", "section 3"
    )  # fmt: skip

    bits: int = 3
    group_size: int = 64
    recent_tokens: int = 0
    num_outliers: int = 1
    before_rotation: bool = True
    key_table: tuple[float, ...] = ()
    value_table: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_range(self.id, "bits", self.bits, "2, 3 or 4", self.bits in BITS)
        check_range(self.id, "group_size", self.group_size, "32 or 64", self.group_size in GROUP_SIZES)
        check_range(self.id, "recent_tokens", self.recent_tokens, "0 or more", self.recent_tokens >= 0)
        check_range(self.id, "num_outliers", self.num_outliers, "0 to 8", 0 <= self.num_outliers <= 8)
        for name in ("key_table", "value_table"):
            table = tuple(float(value) for value in getattr(self, name))  # JSON has lists
            object.__setattr__(self, name, table)
            rising = all(a < b for a, b in itertools.pairwise(table))
            allowed = f"{2**self.bits} rising values, or none for Max's"
            check_range(self.id, name, table, allowed, not table or (len(table) == 2**self.bits and rising))

    @property
    def label(self) -> str:
        where = "before rotation" if self.before_rotation else "as rotated"
        fitted = " fitted" if self.key_table or self.value_table else ""
        return f"{self.bits}-bit{fitted} tables g{self.group_size} +{self.recent_tokens}, {self.num_outliers} apart, {where}"

    @property
    def _ring(self) -> QuantizedKV:
        return QuantizedKV(2, 2, self.group_size, self.recent_tokens)

    def _held(self, regions: Regions) -> Regions:
        """The first token has a place of its own, where nothing else keeps it."""
        if regions.drops or regions.sink_tokens or regions.recent_tokens < 2:
            return regions
        return Regions(1, regions.recent_tokens - 1, drops=False)

    def stored(self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str) -> tuple[StoredTensor, ...]:
        widest = max(site.key_head_dim, site.value_head_dim)
        check_range(self.id, "the head's width", widest, f"at most {MAX_HEAD_DIM}", widest <= MAX_HEAD_DIM)
        regions = self._held(regions)
        ring_tokens, num_groups = self._ring.split(regions)
        out = [*plain_slabs(site, batch_size, regions.sink_tokens + ring_tokens, dtype)]
        if not num_groups:
            return tuple(out)
        tokens = num_groups * self.group_size
        vectors = {"key": (num_groups, site.key_head_dim), "value": (tokens,)}
        for name, width in (("key", site.key_head_dim), ("value", site.value_head_dim)):
            shape = (batch_size, site.num_kv_heads, *vectors[name])
            codes = (batch_size, site.num_kv_heads, tokens, row_bytes(width, self.bits))
            out.append(StoredTensor(f"{name}_codes", "U8", codes))
            out.append(StoredTensor(f"{name}_scales", "F16", shape))
            out.append(StoredTensor(f"{name}_zeros", "F16", shape))
            if self.num_outliers:
                out.append(StoredTensor(f"{name}_places", "U8", (*shape, self.num_outliers)))
                out.append(StoredTensor(f"{name}_outliers", "F16", (*shape, self.num_outliers)))
            out.append(StoredTensor(f"{name}_table", "F32", (batch_size, 1, 2**self.bits)))
        return tuple(out)

    def workspace_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, new_tokens: int, dtype: str
    ) -> int:
        """Attending as to packed groups, with what looking up and turning a block take; or packing, in float32."""
        regions = self._held(regions)
        heads, f32 = batch_size * site.num_kv_heads, DTYPE_BYTES["F32"]
        widest = max(site.key_head_dim, site.value_head_dim)
        inside = self._ring.blockwise_bytes(site, regions, batch_size=batch_size, new_tokens=new_tokens, dtype=dtype)
        block_tokens, groups = self._ring.blocks(regions, new_tokens)
        vectors = max(block_tokens, groups * site.key_head_dim)
        reading = heads * (block_tokens * widest * 3 * f32 + vectors * (2 + 3 * self.num_outliers) * f32)
        packed_tokens = max(1, 256 // self.group_size) * self.group_size
        packing = heads * packed_tokens * (site.key_head_dim + site.value_head_dim + 10 * widest) * f32
        return max(inside + reading, packing)

    def kernel_name(self, site: AttentionSite, regions: Regions, *, dtype: str) -> str:
        regions = self._held(regions)
        return BLOCKWISE if self._ring.split(regions)[1] else self._ring.kernel_name(site, regions, dtype=dtype)

    def build(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str, device: str | torch.device
    ) -> KVLayer:
        held = self._held(regions)
        ring_tokens, num_groups = self._ring.split(held)
        declared = self.stored(site, regions, batch_size=batch_size, dtype=dtype)
        tensors = allocate(declared, device)
        return RingLayer(
            site,
            held,
            batch_size=batch_size,
            ring_tokens=ring_tokens,
            declared=declared,
            tensors=tensors,
            rebuild=lambda rows: self.build(site, regions, batch_size=rows, dtype=dtype, device=device),
            packed=TableGroups(self, site, num_groups, tensors) if num_groups else None,
            plain_tokens=self.recent_tokens,
        )


class TableGroups(PackedGroups):
    """Groups of codes in their slabs; a key's vector is a channel of a group, a value's a token."""

    def __init__(self, part: NonUniformKV, site: AttentionSite, num_groups: int, tensors: dict[str, torch.Tensor]):
        import torch

        from haversack.codecs.codebooks import codebook

        self.part, self.site, self.tensors = part, site, tensors
        self.group_tokens, self.num_groups = part.group_size, num_groups
        usual = tuple(codebook(f"max{part.bits}").ordered.tolist())
        for name, table in (("key", part.key_table), ("value", part.value_table)):
            tensors[f"{name}_table"][:] = torch.tensor(table or usual)
        self._turns = turns_of(part, site)

    def write(self, rows: slice, first_slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        size = self.group_tokens
        groups = slice(first_slot, first_slot + keys.shape[2] // size)
        tokens = slice(first_slot * size, first_slot * size + keys.shape[2])
        x = self._turned(keys.float().unflatten(2, (-1, size)), back=True)
        codes = self._encode("key", rows, groups, x.transpose(3, 4))
        self.tensors["key_codes"][rows, :, tokens] = pack(codes.transpose(3, 4).flatten(2, 3), self.part.bits)
        del x, codes
        codes = self._encode("value", rows, tokens, values.float())
        self.tensors["value_codes"][rows, :, tokens] = pack(codes, self.part.bits)

    def read(self, first_slot: int, last_slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.group_tokens
        groups, tokens = slice(first_slot, last_slot), slice(first_slot * size, last_slot * size)
        keys = self._values("key", tokens, self.site.key_head_dim).unflatten(2, (-1, size))
        self._restore("key", groups, keys.transpose(3, 4))
        keys = self._turned(keys, back=False).flatten(2, 3)
        values = self._values("value", tokens, self.site.value_head_dim)
        self._restore("value", tokens, values)
        return keys, values

    def _encode(self, name: str, rows: slice, where: slice, x: torch.Tensor) -> torch.Tensor:
        """Codes (uint8) of vectors along the last axis, whose scales, zeros and outliers are stored."""
        import torch

        if self.part.num_outliers:
            places = furthest(x, self.part.num_outliers)
            self.tensors[f"{name}_outliers"][rows, :, where] = x.gather(-1, places)
            self.tensors[f"{name}_places"][rows, :, where] = places.to(torch.uint8)
            x = without(x, places)
        center, deviation = center_and_deviation(x)
        table = self.tensors[f"{name}_table"][0, 0]
        borders = (table[1:] + table[:-1]) / 2
        codes = torch.bucketize(((x - center) / deviation).contiguous(), borders, out_int32=True)
        found = table.index_select(0, codes.flatten()).view(x.shape)
        mean = found.mean(-1, keepdim=True)
        found -= mean
        scale = (found * x).sum(-1, keepdim=True) / found.square().sum(-1, keepdim=True).clamp_min_(SMALLEST_SCALE)
        self.tensors[f"{name}_scales"][rows, :, where] = scale[..., 0]
        self.tensors[f"{name}_zeros"][rows, :, where] = (center - scale * mean)[..., 0]
        return codes.to(torch.uint8)

    def _values(self, name: str, tokens: slice, width: int) -> torch.Tensor:
        codes = unpack(self.tensors[f"{name}_codes"][:, :, tokens], self.part.bits, width)
        return self.tensors[f"{name}_table"][0, 0].index_select(0, codes.int().flatten()).view(codes.shape)

    def _restore(self, name: str, where: slice, x: torch.Tensor) -> None:
        """Table values in place to numbers; vectors lie along the last axis."""
        x.mul_(self.tensors[f"{name}_scales"][:, :, where, ..., None].float())
        x.add_(self.tensors[f"{name}_zeros"][:, :, where, ..., None].float())
        if self.part.num_outliers:
            places = self.tensors[f"{name}_places"][:, :, where].long()
            x.scatter_(-1, places, self.tensors[f"{name}_outliers"][:, :, where].float())

    def _turned(self, x: torch.Tensor, *, back: bool) -> torch.Tensor:
        return x if self._turns is None else turned(x, self._turns, back=back)


def furthest(x: torch.Tensor, count: int) -> torch.Tensor:
    """Places in each vector (last axis) of the numbers furthest from its mean."""
    return (x - x.mean(-1, keepdim=True)).abs_().topk(count, dim=-1).indices


def without(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The mean of each vector in those places."""
    return x.scatter(-1, places, x.mean(-1, keepdim=True).expand_as(places))


def center_and_deviation(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.mean(-1, keepdim=True), x.std(-1, correction=0, keepdim=True).clamp_min_(SMALLEST_SCALE)


def turns_of(part: NonUniformKV, site: AttentionSite) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosines and sines `(group_size, head_dim / 2)` by which a group's tokens are turned from its first (Su et al. 2021, arXiv 2104.09864); None where
    keys stay as they are."""
    import torch

    if not part.before_rotation or site.rope_theta is None:
        return None
    speeds = site.rope_theta ** (-torch.arange(0, site.key_head_dim, 2) / site.key_head_dim)
    angles = torch.arange(part.group_size)[:, None] * speeds
    return angles.cos(), angles.sin()


def turned(x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor], *, back: bool) -> torch.Tensor:
    """Keys `(..., group_tokens, head_dim)`, halves paired, turned to their group's first token, or from it to their own place."""
    import torch

    cos, sin = (turn.to(x.device) for turn in turns)
    sin = -sin if back else sin
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)
