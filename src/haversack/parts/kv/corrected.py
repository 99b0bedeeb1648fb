"""Packed groups with their errors corrected: a low-rank residual, and the few numbers that fit no grid kept apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.kv.base import KVLayer, PackedGroups, Regions, Represent
from haversack.parts.kv.layer import RingLayer
from haversack.parts.kv.quantized import QuantizedGroups, QuantizedKV
from haversack.parts.kv.slabs import allocate, plain_slabs

if TYPE_CHECKING:
    import torch

ITERATIONS = 2
"""Of subspace iteration, as many as the source takes."""

MAX_HEAD_DIM = 256
"""An outlier's channel is stored in a byte."""


@dataclass(frozen=True)
class CorrectedKV(Represent):
    """Pack as `kv.per-channel-keys` does, and store with every group and head of keys, and of values, what that loses: a residual of `rank`,
    and `num_outliers` numbers, those furthest from the mean of what shares their scale, as they are.

    Bytes, beside those of `kv.per-channel-keys`, per group of g tokens and KV head of D channels, for keys and for values each: 2 r (g + D) + 4 n.
    Error: none known but that the residual's share in its first r directions is taken off, to float16. Attention is blockwise, for compiled kernels don't
    know this form. Differs from the source in that every head and group has its own factors, where the source takes a prompt at once.
    """

    id: ClassVar[str] = "kv.corrected"
    title: ClassVar[str] = "Packed groups with a low-rank residual and outliers apart"
    source: ClassVar[Source | None] = Source(
        "Kang et al.", 2024, "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM", "2403.05527", "section 3"
    )  # fmt: skip

    key_bits: int = 2
    value_bits: int = 2
    group_size: int = 64
    recent_tokens: int = 0
    rank: int = 2
    num_outliers: int = 16

    def __post_init__(self) -> None:
        check_range(self.id, "rank", self.rank, "0 to 16", 0 <= self.rank <= 16)
        check_range(self.id, "num_outliers", self.num_outliers, "0 to 256", 0 <= self.num_outliers <= 256)
        assert self._packed  # its fields are checked there

    @property
    def _packed(self) -> QuantizedKV:
        return QuantizedKV(self.key_bits, self.value_bits, self.group_size, self.recent_tokens)

    @property
    def label(self) -> str:
        return f"{self._packed.label} rank {self.rank} and {self.num_outliers} apart"

    def stored(self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str) -> tuple[StoredTensor, ...]:
        widest = max(site.key_head_dim, site.value_head_dim)
        check_range(self.id, "the head's width", widest, f"at most {MAX_HEAD_DIM}", widest <= MAX_HEAD_DIM)
        ring_tokens, num_groups = self._packed.split(regions)
        plain = plain_slabs(site, batch_size, regions.sink_tokens + ring_tokens, dtype)
        if not num_groups:
            return plain
        out = [*plain, *self._packed.stored_groups(site, batch_size, num_groups)]
        leading = (batch_size, site.num_kv_heads, num_groups)
        for name, width in (("key", site.key_head_dim), ("value", site.value_head_dim)):
            if self.rank:
                out.append(StoredTensor(f"{name}_left", "F16", (*leading, self.group_size, self.rank)))
                out.append(StoredTensor(f"{name}_right", "F16", (*leading, self.rank, width)))
            if self.num_outliers:
                out.append(StoredTensor(f"{name}_places", "U8", (*leading, self.num_outliers, 2)))
                out.append(StoredTensor(f"{name}_outliers", "F16", (*leading, self.num_outliers)))
        return tuple(out)

    def workspace_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, new_tokens: int, dtype: str
    ) -> int:
        """Attending as to packed groups, with the correction of a block; or packing, whose residual is found in float32."""
        heads, f32 = batch_size * site.num_kv_heads, DTYPE_BYTES["F32"]
        inside = self._packed.blockwise_bytes(site, regions, batch_size=batch_size, new_tokens=new_tokens, dtype=dtype)
        block_tokens, groups = self._packed.blocks(regions, new_tokens)
        widest = max(site.key_head_dim, site.value_head_dim)
        reading = heads * block_tokens * (2 * widest * f32 + self.rank * f32)
        reading += heads * groups * (self.rank * widest * f32 + self.num_outliers * (8 + f32))
        packing = heads * max(1, 256 // self.group_size) * self.group_size * widest * (8 * f32 + 8)
        return max(inside + reading, packing)

    def kernel_name(self, site: AttentionSite, regions: Regions, *, dtype: str) -> str:
        from haversack.parts.kv.attention import BLOCKWISE

        return BLOCKWISE if self._packed.split(regions)[1] else self._packed.kernel_name(site, regions, dtype=dtype)

    def build(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str, device: str | torch.device
    ) -> KVLayer:
        ring_tokens, num_groups = self._packed.split(regions)
        declared = self.stored(site, regions, batch_size=batch_size, dtype=dtype)
        tensors = allocate(declared, device)
        packed = QuantizedGroups(self._packed, site, num_groups, tensors)
        return RingLayer(
            site,
            regions,
            batch_size=batch_size,
            ring_tokens=ring_tokens,
            declared=declared,
            tensors=tensors,
            rebuild=lambda rows: self.build(site, regions, batch_size=rows, dtype=dtype, device=device),
            packed=CorrectedGroups(self, packed) if num_groups else None,
            plain_tokens=self.recent_tokens,
        )


class CorrectedGroups(PackedGroups):
    """Packed groups, and beside each what its codes lose."""

    def __init__(self, part: CorrectedKV, packed: QuantizedGroups):
        self.part = part
        self.packed = packed
        self.group_tokens = packed.group_tokens
        self.num_groups = packed.num_groups
        self.tensors = packed.tensors

    def write(self, rows: slice, first_slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        num_groups = keys.shape[2] // self.group_tokens
        groups = slice(first_slot, first_slot + num_groups)
        x = {"key": self._grouped(keys), "value": self._grouped(values)}
        for name, dim in (("key", 3), ("value", 4)):  # what shares a scale: a channel's tokens, or a token's channels
            self._set_apart(name, rows, groups, x[name], x[name].mean(dim, keepdim=True))
        self.packed.write(rows, first_slot, x["key"].flatten(2, 3), x["value"].flatten(2, 3))
        read = self.packed.read(first_slot, first_slot + num_groups)
        if self.part.rank:
            for name, found in zip(("key", "value"), read):
                residual = x[name].sub_(self._grouped(found[rows]))
                left, right = low_rank(residual, self.part.rank)
                self.tensors[f"{name}_left"][rows, :, groups] = left
                self.tensors[f"{name}_right"][rows, :, groups] = right

    def read(self, first_slot: int, last_slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.packed.read(first_slot, last_slot)
        groups = slice(first_slot, last_slot)
        return self._corrected("key", keys, groups), self._corrected("value", values, groups)

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        """`(rows, kv_heads, groups, group_tokens, head_dim)` float32, its own copy."""
        import torch

        return x.to(torch.float32, copy=True).unflatten(2, (-1, self.group_tokens))

    def _set_apart(self, name: str, rows: slice, groups: slice, x: torch.Tensor, center: torch.Tensor) -> None:
        """Store the numbers of each group that are furthest from `center`, which takes their place in `x`."""
        import torch

        if not self.part.num_outliers:
            return
        width, flat = x.shape[-1], x.flatten(3)
        places = (x - center).abs_().flatten(3).topk(self.part.num_outliers, dim=3, sorted=True).indices
        self.tensors[f"{name}_outliers"][rows, :, groups] = flat.gather(3, places)
        self.tensors[f"{name}_places"][rows, :, groups, :, 0] = (places // width).to(torch.uint8)
        self.tensors[f"{name}_places"][rows, :, groups, :, 1] = (places % width).to(torch.uint8)
        flat.scatter_(3, places, center.expand_as(x).flatten(3).gather(3, places))

    def _corrected(self, name: str, x: torch.Tensor, groups: slice) -> torch.Tensor:
        import torch

        grouped = x.unflatten(2, (-1, self.group_tokens))
        if self.part.rank:
            left, right = (self.tensors[f"{name}_{side}"][:, :, groups].float() for side in ("left", "right"))
            grouped.add_(torch.matmul(left, right))
        if self.part.num_outliers:
            places = self.tensors[f"{name}_places"][:, :, groups].long()
            flat = grouped.flatten(3)
            index = places[..., 0] * x.shape[-1] + places[..., 1]
            flat.scatter_(3, index, self.tensors[f"{name}_outliers"][:, :, groups].float())
        return x


def low_rank(x: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors `(..., n, rank)` and `(..., rank, d)` whose product is near the best of that rank, by subspace iteration from a fixed start."""
    import torch

    generator = torch.Generator().manual_seed(0)
    start = torch.randn((x.shape[-1], rank), generator=generator).to(x.device)
    left = torch.linalg.qr(x @ start).Q
    for _ in range(ITERATIONS):
        left = torch.linalg.qr(x @ (x.transpose(-1, -2) @ left)).Q
    return left, left.transpose(-1, -2) @ x
