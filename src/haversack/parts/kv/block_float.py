"""Block floating point: channels that lie side by side share an exponent, and each keeps a few bits of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.kv.attention import BLOCKWISE
from haversack.parts.kv.base import KVLayer, PackedGroups, Regions, Represent, Slots
from haversack.parts.kv.layer import RingLayer
from haversack.parts.kv.packing import channel_groups, num_channel_groups, pack, row_bytes, unpack
from haversack.parts.kv.quantized import QuantizedKV
from haversack.parts.kv.slabs import allocate, plain_slabs

if TYPE_CHECKING:
    import torch

BITS = (8, 4, 3, 2)
BLOCK_SIZES = (16, 32, 64)
GROUP_TOKENS = 32
"""Tokens that leave the recent ring together; nothing is shared between them."""

EXPONENT_BIAS = 128
LOWEST_EXPONENT = -126
"""Of a block's step: below it, float32 would be subnormal."""


@dataclass(frozen=True)
class BlockFloatKV(Represent):
    """Pack all but the most recent tokens to `bits` per number (two's complement) and an exponent of 8 bits per `block_size` channels (a last block may be smaller).

    Bytes beyond the recent window, per token and KV head, with D channels of keys and of values each: 2 (ceil(D b / 8) + ceil(D / block_size)): 0.266 of 16 bits at 4 bits, blocks of
    32. Error: |x - x'| <= s / 2, and s at the largest of a block, where s = 2^(e - b + 2) is its step and 2^e the largest power of two that is not above its largest
    magnitude: an outlier widens its whole block's step, so that channels had better be ordered by magnitude first (`kv.channels`). Exponents cost half of a float16
    scale and a quarter of a scale and a zero. Where heads choose tokens, each is packed when it comes, as by `kv.per-token`. Attention is blockwise.
    """

    id: ClassVar[str] = "kv.block-float"
    title: ClassVar[str] = "Keys and values per token in blocks of channels with one exponent"
    source: ClassVar[Source | None] = Source(
        "Trukhanov and Soloveychik", 2024, "Accurate Block Quantization in LLMs with Outliers", "2403.20137", "section 2"
    )  # fmt: skip

    bits: int = 4
    block_size: int = 32
    recent_tokens: int = 0

    def __post_init__(self) -> None:
        check_range(self.id, "bits", self.bits, "8, 4, 3 or 2", self.bits in BITS)
        check_range(self.id, "block_size", self.block_size, "16, 32 or 64", self.block_size in BLOCK_SIZES)
        check_range(self.id, "recent_tokens", self.recent_tokens, "0 or more", self.recent_tokens >= 0)

    @property
    def label(self) -> str:
        return f"{self.bits}-bit block float g{self.block_size} +{self.recent_tokens}"

    @property
    def _ring(self) -> QuantizedKV:
        return QuantizedKV(2, 2, GROUP_TOKENS, self.recent_tokens)

    def stored(self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str) -> tuple[StoredTensor, ...]:
        ring_tokens, num_groups = self._ring.split(regions)
        plain = plain_slabs(site, batch_size, regions.sink_tokens + ring_tokens, dtype)
        if not num_groups:
            return plain
        return (*plain, *self.stored_slots(site, num_groups * GROUP_TOKENS, batch_size=batch_size, dtype=dtype))

    def stored_slots(
        self, site: AttentionSite, num_slots: int, *, batch_size: int, dtype: str
    ) -> tuple[StoredTensor, ...]:
        leading = (batch_size, site.num_kv_heads, num_slots)
        out: list[StoredTensor] = []
        for name, width in (("key", site.key_head_dim), ("value", site.value_head_dim)):
            out.append(StoredTensor(f"{name}_codes", "U8", (*leading, row_bytes(width, self.bits))))
            out.append(StoredTensor(f"{name}_exponents", "U8", (*leading, num_channel_groups(width, self.block_size))))
        return tuple(out)

    def workspace_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, new_tokens: int, dtype: str
    ) -> int:
        """Attending as to other packed tokens; or packing as many as leave the ring at once, in float32."""
        sizes = {"batch_size": batch_size, "new_tokens": new_tokens, "dtype": dtype}
        if not self._ring.split(regions)[1]:
            return self._ring.workspace_bytes(site, regions, **sizes)  # type: ignore[arg-type]
        f32, heads = DTYPE_BYTES["F32"], batch_size * site.num_kv_heads
        inside = self._ring.blockwise_bytes(site, regions, **sizes)  # type: ignore[arg-type]
        block_tokens, _ = self._ring.blocks(regions, new_tokens)
        widest = max(site.key_head_dim, site.value_head_dim)
        reading = heads * block_tokens * 2 * num_channel_groups(widest, self.block_size) * f32
        packing = heads * 256 * (site.key_head_dim + site.value_head_dim + 4 * widest) * f32
        return max(inside + reading, packing)

    def kernel_name(self, site: AttentionSite, regions: Regions, *, dtype: str) -> str:
        return BLOCKWISE if self._ring.split(regions)[1] else self._ring.kernel_name(site, regions, dtype=dtype)

    def build(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str, device: str | torch.device
    ) -> KVLayer:
        ring_tokens, num_groups = self._ring.split(regions)
        declared = self.stored(site, regions, batch_size=batch_size, dtype=dtype)
        tensors = allocate(declared, device)
        return RingLayer(
            site,
            regions,
            batch_size=batch_size,
            ring_tokens=ring_tokens,
            declared=declared,
            tensors=tensors,
            rebuild=lambda rows: self.build(site, regions, batch_size=rows, dtype=dtype, device=device),
            packed=BlockGroups(BlockSlots(self, site, tensors), num_groups) if num_groups else None,
            plain_tokens=self.recent_tokens,
        )

    def slots(self, tensors: dict[str, torch.Tensor], site: AttentionSite) -> Slots:
        return BlockSlots(self, site, tensors)


class BlockSlots(Slots):
    """Slots of one token each."""

    def __init__(self, part: BlockFloatKV, site: AttentionSite, tensors: dict[str, torch.Tensor]):
        self.part = part
        self.widths = {"key": site.key_head_dim, "value": site.value_head_dim}
        self.tensors = {name: t for name, t in tensors.items() if name.endswith(("_codes", "_exponents"))}

    def write(self, rows: slice, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        slots = slice(first, first + keys.shape[2])
        for name, x in (("key", keys), ("value", values)):
            codes, exponents = self._encoded(x)
            self.tensors[f"{name}_codes"][rows, :, slots] = pack(codes, self.part.bits)
            self.tensors[f"{name}_exponents"][rows, :, slots] = exponents

    def as_stored(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._rounded(keys), self._rounded(values)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        codes, exponents = self._encoded(x)
        return self._decoded(codes.float(), exponents)

    def read(self, rows: slice, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._read("key", rows, slice(first, last)), self._read("value", rows, slice(first, last))

    def _read(self, name: str, rows: slice, slots: slice) -> torch.Tensor:
        codes = unpack(self.tensors[f"{name}_codes"][rows, :, slots], self.part.bits, self.widths[name])
        return self._decoded(codes, self.tensors[f"{name}_exponents"][rows, :, slots])

    def _encoded(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (uint8, the shape of x, zero at 2^(bits - 1)) and exponents (uint8, one per block) of numbers `(..., channels)`."""
        import torch

        half, channels = 2 ** (self.part.bits - 1), channel_groups(x.shape[-1], self.part.block_size)
        codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        exponents = torch.empty((*x.shape[:-1], len(channels)), dtype=torch.uint8, device=x.device)
        for i, block in enumerate(channels):
            part = x[..., block].float()
            _, above = torch.frexp(
                part.abs().amax(-1, keepdim=True)
            )  # the largest is below 2^above, and not below half of that
            step = (above - (self.part.bits - 1)).clamp_(LOWEST_EXPONENT, 127)
            exponents[..., i : i + 1] = step + EXPONENT_BIAS
            part = torch.ldexp(part, -step).round_().clamp_(-half, half - 1)
            codes[..., block] = part.add_(half).to(torch.uint8)
        return codes, exponents

    def _decoded(self, codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
        """Numbers in the place of codes in float32."""
        codes.sub_(2 ** (self.part.bits - 1))
        for i, block in enumerate(channel_groups(codes.shape[-1], self.part.block_size)):
            codes[..., block].mul_((exponents[..., i : i + 1].float() - EXPONENT_BIAS).exp2_())
        return codes

    def movable(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.tensors.values())


class BlockGroups(PackedGroups):
    """The same slots, written and read by groups."""

    def __init__(self, slots: BlockSlots, num_groups: int):
        self.slots = slots
        self.tensors = slots.tensors
        self.group_tokens, self.num_groups = GROUP_TOKENS, num_groups

    def write(self, rows: slice, first_slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.slots.write(rows, first_slot * GROUP_TOKENS, keys, values)

    def read(self, first_slot: int, last_slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.slots.read(slice(None), first_slot * GROUP_TOKENS, last_slot * GROUP_TOKENS)
