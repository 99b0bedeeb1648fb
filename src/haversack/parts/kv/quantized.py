"""Keys per channel in groups of tokens, values per token in groups of channels, at 8, 4 or 2 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.kv.attention import attention_workspace_bytes, decode_form, decode_kernel_name, key_block_tokens
from haversack.parts.kv.base import KVLayer, PackedGroups, Regions, Represent
from haversack.parts.kv.layer import RingLayer
from haversack.parts.kv.packing import channel_groups, num_channel_groups, pack, quantize, row_bytes, unpack
from haversack.parts.kv.slabs import allocate, plain_slabs, torch_dtype

if TYPE_CHECKING:
    import torch

    from haversack.kernels.attention import CacheForm

BITS = (8, 4, 2)
GROUP_SIZES = (32, 64)


@dataclass(frozen=True)
class QuantizedKV(Represent):
    """Pack all but the most recent tokens to `key_bits` and `value_bits` per number.

    Keys: asymmetric, one scale and zero per channel and group of `group_size` tokens. Values: the same per token and
    group of up to `group_size` channels (a last group is smaller where the head's width asks for it). Scales and zeros
    are float16 and count. The most recent `recent_tokens`, and up to `group_size - 1` more that wait for their group to
    fill, stay in the model's dtype, sinks too.

    Bytes beyond the recent window, per token and KV head, with D channels, b bits, groups of g: keys
    ceil(D b / 8) + 4 D / g, values ceil(D b / 8) + 4 ceil(D / g): 0.156 of 16 bits at 2 bits, groups of 64 and D a
    multiple of 64. Error: |x - x'| <= s / 2 + 2^-11 (|min| + max - min) + 2^(b - 25), where s = (max - min) / (2^b - 1) in
    the group and the rest is the rounding of zero and scale to float16.
    Differs from the source in that the values' recent window is as long as the keys' and moves by whole groups.
    """

    id: ClassVar[str] = "kv.per-channel-keys"
    title: ClassVar[str] = "Per-channel keys and per-token values at low precision, a recent window as is"
    source: ClassVar[Source | None] = Source(
        "Liu et al.", 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", "2402.02750", "section 3.3"
    )

    key_bits: int = 2
    value_bits: int = 2
    group_size: int = 64
    recent_tokens: int = 64

    def __post_init__(self) -> None:
        check_range(self.id, "key_bits", self.key_bits, "8, 4 or 2", self.key_bits in BITS)
        check_range(self.id, "value_bits", self.value_bits, "8, 4 or 2", self.value_bits in BITS)
        check_range(self.id, "group_size", self.group_size, "32 or 64", self.group_size in GROUP_SIZES)
        check_range(self.id, "recent_tokens", self.recent_tokens, "0 or more", self.recent_tokens >= 0)

    @property
    def label(self) -> str:
        return f"K{self.key_bits}V{self.value_bits} g{self.group_size} +{self.recent_tokens}"

    def split(self, regions: Regions) -> tuple[int, int]:
        """Slots of the ring in the model's dtype, and groups of packed tokens behind it.

        With growth refused at the capacity, a group is packed only once it is whole. With old tokens dropped, the
        oldest group may reach beyond the window; it is held until the whole of it may go.
        """
        ring_tokens = self.recent_tokens + self.group_size - 1
        if regions.recent_tokens <= ring_tokens:
            return regions.recent_tokens, 0
        behind = regions.recent_tokens - self.recent_tokens
        return ring_tokens, -(-behind // self.group_size) if regions.drops else behind // self.group_size

    def stored(self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str) -> tuple[StoredTensor, ...]:
        ring_tokens, num_groups = self.split(regions)
        plain = plain_slabs(site, batch_size, regions.sink_tokens + ring_tokens, dtype)
        if not num_groups:
            return plain
        return (*plain, *self.stored_groups(site, batch_size, num_groups))

    def stored_groups(self, site: AttentionSite, batch_size: int, num_groups: int) -> tuple[StoredTensor, ...]:
        """The packed groups alone."""
        leading = (batch_size, site.num_kv_heads)
        tokens = num_groups * self.group_size
        scales = (num_groups, site.key_head_dim)
        value_scales = (tokens, num_channel_groups(site.value_head_dim, self.group_size))
        return (
            StoredTensor("key_codes", "U8", (*leading, tokens, row_bytes(site.key_head_dim, self.key_bits))),
            StoredTensor("key_scales", "F16", (*leading, *scales)),
            StoredTensor("key_zeros", "F16", (*leading, *scales)),
            StoredTensor("value_codes", "U8", (*leading, tokens, row_bytes(site.value_head_dim, self.value_bits))),
            StoredTensor("value_scales", "F16", (*leading, *value_scales)),
            StoredTensor("value_zeros", "F16", (*leading, *value_scales)),
        )

    def workspace_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, new_tokens: int, dtype: str
    ) -> int:
        num_groups = self.split(regions)[1]
        form = self._decode_form(site, num_groups, dtype) if new_tokens == 1 else None
        if form is not None:
            return max(form.workspace_bytes(batch_size), self._pack_bytes(site, num_groups, batch_size))
        return self.blockwise_bytes(site, regions, batch_size=batch_size, new_tokens=new_tokens, dtype=dtype)

    def blocks(self, regions: Regions, new_tokens: int) -> tuple[int, int]:
        """Tokens of the largest block that attention reads at once, and packed groups in it."""
        ring_tokens, num_groups = self.split(regions)
        held = max(regions.sink_tokens + ring_tokens, num_groups * self.group_size, new_tokens)
        block_tokens = min(key_block_tokens(new_tokens), held)
        return block_tokens, -(-block_tokens // self.group_size)

    def blockwise_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, new_tokens: int, dtype: str
    ) -> int:
        """`workspace_bytes` where no compiled kernel attends."""
        block_tokens, _ = self.blocks(regions, new_tokens)
        heads = batch_size * site.num_kv_heads
        f32 = DTYPE_BYTES["F32"]
        # keys, values, and while the later of them is made: its codes, a plane of them, and its scales in float32
        widest = max(site.key_head_dim, site.value_head_dim)
        block_bytes = (
            heads
            * block_tokens
            * (
                (site.key_head_dim + site.value_head_dim) * f32
                + 2 * widest
                + 2 * f32 * num_channel_groups(site.value_head_dim, self.group_size)
            )
        )
        return attention_workspace_bytes(
            batch_size=batch_size,
            num_heads=site.num_heads,
            num_kv_heads=site.num_kv_heads,
            key_head_dim=site.key_head_dim,
            value_head_dim=site.value_head_dim,
            num_queries=new_tokens,
            block_tokens=block_tokens,
            block_bytes=block_bytes,
        )

    def kernel_name(self, site: AttentionSite, regions: Regions, *, dtype: str) -> str:
        return decode_kernel_name(self._decode_form(site, self.split(regions)[1], dtype))

    def _decode_form(self, site: AttentionSite, num_groups: int, dtype: str) -> CacheForm | None:
        bits = (self.key_bits, self.value_bits) if num_groups else (0, 0)
        return decode_form(site, torch_dtype(dtype), *bits, self.group_size)

    def _pack_bytes(self, site: AttentionSite, num_groups: int, batch_size: int) -> int:
        """What packing one group that leaves the ring takes: its tokens as they are, and in float32 three times."""
        if not num_groups:
            return 0
        heads, f32 = batch_size * site.num_kv_heads, DTYPE_BYTES["F32"]
        widest = max(site.key_head_dim, site.value_head_dim)
        copies = heads * self.group_size * (site.key_head_dim + site.value_head_dim) * f32
        statistics = 8 * f32 * heads * max(widest, self.group_size)
        return copies + heads * self.group_size * widest * (2 * f32 + 2) + statistics

    def build(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str, device: str | torch.device
    ) -> KVLayer:
        ring_tokens, num_groups = self.split(regions)
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
            packed=QuantizedGroups(self, site, num_groups, tensors) if num_groups else None,
            plain_tokens=self.recent_tokens,
        )


class QuantizedGroups(PackedGroups):
    """Packed groups in their slabs; layout `kv-tokens-v1`.

    Codes are `(batch, kv_heads, tokens, row_bytes)`: a token's row holds planes, not neighbours: with P = 8 / bits codes
    to a byte and n = row_bytes, byte j holds channels j, n + j, 2n + j ... from the low bits up, so that a plane is
    contiguous after one shift and mask.
    """

    def __init__(self, part: QuantizedKV, site: AttentionSite, num_groups: int, tensors: dict[str, torch.Tensor]):
        self.part = part
        self.site = site
        self.code_bits = (part.key_bits, part.value_bits)
        self.group_tokens = part.group_size
        self.num_groups = num_groups
        self.tensors = tensors

    def write(self, rows: slice, first_slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        import torch

        size, part = self.group_tokens, self.part
        num_groups = keys.shape[2] // size
        groups = slice(first_slot, first_slot + num_groups)
        tokens = slice(first_slot * size, (first_slot + num_groups) * size)
        x = keys.to(torch.float32).unflatten(2, (num_groups, size))
        codes, scale, zero = quantize(x, part.key_bits, dim=3)
        self.tensors["key_codes"][rows, :, tokens] = pack(codes.flatten(2, 3), part.key_bits)
        self.tensors["key_scales"][rows, :, groups] = scale.squeeze(3)
        self.tensors["key_zeros"][rows, :, groups] = zero.squeeze(3)
        del x, codes
        x = values.to(torch.float32)
        codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        for g, channels in enumerate(channel_groups(x.shape[-1], size)):
            codes[..., channels], scale, zero = quantize(x[..., channels], part.value_bits, dim=3)
            self.tensors["value_scales"][rows, :, tokens, g : g + 1] = scale
            self.tensors["value_zeros"][rows, :, tokens, g : g + 1] = zero
        self.tensors["value_codes"][rows, :, tokens] = pack(codes, part.value_bits)

    def read(self, first_slot: int, last_slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        size, part = self.group_tokens, self.part
        groups, tokens = slice(first_slot, last_slot), slice(first_slot * size, last_slot * size)
        keys = unpack(self.tensors["key_codes"][:, :, tokens], part.key_bits, self.site.key_head_dim)
        grouped = keys.unflatten(2, (last_slot - first_slot, size))
        grouped.mul_(self.tensors["key_scales"][:, :, groups, None].float())
        grouped.add_(self.tensors["key_zeros"][:, :, groups, None].float())
        values = unpack(self.tensors["value_codes"][:, :, tokens], part.value_bits, self.site.value_head_dim)
        for g, channels in enumerate(channel_groups(values.shape[-1], size)):
            values[..., channels].mul_(self.tensors["value_scales"][:, :, tokens, g : g + 1].float())
            values[..., channels].add_(self.tensors["value_zeros"][:, :, tokens, g : g + 1].float())
        return keys, values
