"""Keys and values as they are, in the model's dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.kv.attention import (
    as_block,
    attention_workspace_bytes,
    decode_form,
    decode_kernel_name,
    key_block_tokens,
)
from haversack.parts.kv.base import KVLayer, PackedGroups, Regions, Represent, Slots
from haversack.parts.kv.layer import RingLayer
from haversack.parts.kv.slabs import allocate, plain_slabs, torch_dtype

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PlainKV(Represent):
    """Store keys and values in the model's own dtype.

    Bytes: batch * kv_heads * tokens * (key_head_dim + value_head_dim) * dtype bytes. Error: none; bit for bit the cache
    of transformers under the same attention function and prefill chunks.
    """

    id: ClassVar[str] = "kv.plain"
    title: ClassVar[str] = "Keys and values in the model's dtype"
    lossless: ClassVar[bool] = True

    def stored(self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str) -> tuple[StoredTensor, ...]:
        return plain_slabs(site, batch_size, regions.total_tokens, dtype)

    def stored_slots(
        self, site: AttentionSite, num_slots: int, *, batch_size: int, dtype: str
    ) -> tuple[StoredTensor, ...]:
        return plain_slabs(site, batch_size, num_slots, dtype)

    def slots(self, tensors: dict[str, torch.Tensor], site: AttentionSite) -> Slots:
        return PlainSlots(tensors)

    def workspace_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, new_tokens: int, dtype: str
    ) -> int:
        form = decode_form(site, torch_dtype(dtype)) if new_tokens == 1 else None
        if form is not None:
            return form.workspace_bytes(batch_size)
        block_tokens = min(key_block_tokens(new_tokens), max(regions.total_tokens, new_tokens))
        heads = batch_size * site.num_kv_heads
        block_bytes = heads * block_tokens * (site.key_head_dim + site.value_head_dim) * DTYPE_BYTES["F32"]
        if regions.drops:  # a block across the ring's end is joined before it is expanded
            block_bytes += heads * block_tokens * max(site.key_head_dim, site.value_head_dim) * DTYPE_BYTES[dtype]
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
        return decode_kernel_name(decode_form(site, torch_dtype(dtype)))

    def build(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str, device: str | torch.device
    ) -> KVLayer:
        declared = self.stored(site, regions, batch_size=batch_size, dtype=dtype)
        return RingLayer(
            site,
            regions,
            batch_size=batch_size,
            ring_tokens=regions.recent_tokens,
            declared=declared,
            tensors=allocate(declared, device),
            rebuild=lambda rows: self.build(site, regions, batch_size=rows, dtype=dtype, device=device),
        )


class PlainSlots(Slots):
    """Slots in the model's dtype."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.keys, self.values = tensors["keys"], tensors["values"]

    def write(self, rows: slice, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys[rows, :, first : first + keys.shape[2]] = keys
        self.values[rows, :, first : first + keys.shape[2]] = values

    def read(self, rows: slice, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        return as_block(self.keys[rows, :, first:last]), as_block(self.values[rows, :, first:last])

    def replace(self, rows: slice, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        for slab, x in ((self.keys, keys), (self.values, values)):
            slab[rows].scatter_(2, slots[..., None].expand_as(x), x.to(slab.dtype))

    def movable(self) -> tuple[torch.Tensor, ...]:
        return self.keys, self.values


class PlainGroups(PackedGroups):
    """Groups in the dtype of their slabs `(batch, kv_heads, groups * group_tokens, width)`."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, group_tokens: int):
        self.tensors = {"keys": keys, "values": values}
        self.group_tokens, self.num_groups = group_tokens, keys.shape[2] // group_tokens

    def write(self, rows: slice, first_slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        first = first_slot * self.group_tokens
        for name, x in (("keys", keys), ("values", values)):
            self.tensors[name][rows, :, first : first + x.shape[2]] = x.to(self.tensors[name].dtype)

    def read(self, first_slot: int, last_slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = slice(first_slot * self.group_tokens, last_slot * self.group_tokens)
        return as_block(self.tensors["keys"][:, :, tokens]), as_block(self.tensors["values"][:, :, tokens])
