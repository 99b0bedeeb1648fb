"""Keys and values per token at 8, 4 or 2 bits: nothing is shared between tokens, so that heads can choose between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.ledger import StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.kv.base import KVLayer, Regions, Represent, Slots
from haversack.parts.kv.packing import channel_groups, num_channel_groups, pack, quantize, row_bytes, unpack
from haversack.parts.kv.quantized import BITS, GROUP_SIZES, QuantizedKV

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PerTokenKV(Represent):
    """Pack every token for itself: `bits` per number, and a float16 scale and zero per `group_size` channels (a last group may be smaller).

    Bytes per token and KV head, with D channels: 2 (ceil(D b / 8) + 4 ceil(D / g)): 0.31 of 16 bits at 4 bits, D a multiple of 64 and groups of 32. Error: as
    `kv.per-channel-keys` has for values, for keys too: a channel that is large in every token widens its group's steps. Tokens are packed
    when they come, and once; the queries of their own chunk see them so too. Where heads choose nothing (a native window, a context as short as what is held), tokens are packed as by
    `kv.per-channel-keys` at the same bits, all of them. Differs from the source in that channels are not normalised first: that takes
    statistics of a prompt that is there as a whole.
    """

    id: ClassVar[str] = "kv.per-token"
    title: ClassVar[str] = "Keys and values per token at low precision, so that heads can choose between them"
    source: ClassVar[Source | None] = Source(
        "He et al.", 2024, "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification", "2405.14256", "section 4.1"
    )  # fmt: skip

    bits: int = 4
    group_size: int = 32

    def __post_init__(self) -> None:
        check_range(self.id, "bits", self.bits, "8, 4 or 2", self.bits in BITS)
        check_range(self.id, "group_size", self.group_size, "32 or 64", self.group_size in GROUP_SIZES)

    @property
    def label(self) -> str:
        return f"{self.bits} bits per token g{self.group_size}"

    @property
    def _in_groups(self) -> QuantizedKV:
        return QuantizedKV(self.bits, self.bits, self.group_size, 0)

    def stored(self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str) -> tuple[StoredTensor, ...]:
        return self._in_groups.stored(site, regions, batch_size=batch_size, dtype=dtype)

    def workspace_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, new_tokens: int, dtype: str
    ) -> int:
        return self._in_groups.workspace_bytes(site, regions, batch_size=batch_size, new_tokens=new_tokens, dtype=dtype)

    def kernel_name(self, site: AttentionSite, regions: Regions, *, dtype: str) -> str:
        return self._in_groups.kernel_name(site, regions, dtype=dtype)

    def build(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str, device: str | torch.device
    ) -> KVLayer:
        return self._in_groups.build(site, regions, batch_size=batch_size, dtype=dtype, device=device)

    def stored_slots(
        self, site: AttentionSite, num_slots: int, *, batch_size: int, dtype: str
    ) -> tuple[StoredTensor, ...]:
        leading = (batch_size, site.num_kv_heads, num_slots)
        out: list[StoredTensor] = []
        for name, width in (("key", site.key_head_dim), ("value", site.value_head_dim)):
            groups = num_channel_groups(width, self.group_size)
            out += [
                StoredTensor(f"slot_{name}_codes", "U8", (*leading, row_bytes(width, self.bits))),
                StoredTensor(f"slot_{name}_scales", "F16", (*leading, groups)),
                StoredTensor(f"slot_{name}_zeros", "F16", (*leading, groups)),
            ]
        return tuple(out)

    def slots(self, tensors: dict[str, torch.Tensor], site: AttentionSite) -> Slots:
        return PackedSlots(self, site, tensors)


class PackedSlots(Slots):
    """Slots in few bits."""

    def __init__(self, part: PerTokenKV, site: AttentionSite, tensors: dict[str, torch.Tensor]):
        self.part = part
        self.widths = {"key": site.key_head_dim, "value": site.value_head_dim}
        self.tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("slot_")}

    def write(self, rows: slice, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        import torch

        slots = slice(first, first + keys.shape[2])
        for name, x in (("key", keys), ("value", values)):
            codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
            for g, channels in enumerate(channel_groups(x.shape[-1], self.part.group_size)):
                codes[..., channels], scale, zero = quantize(x[..., channels].float(), self.part.bits, dim=3)
                self.tensors[f"slot_{name}_scales"][rows, :, slots, g : g + 1] = scale
                self.tensors[f"slot_{name}_zeros"][rows, :, slots, g : g + 1] = zero
            self.tensors[f"slot_{name}_codes"][rows, :, slots] = pack(codes, self.part.bits)

    def as_stored(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._rounded(keys), self._rounded(values)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        for channels in channel_groups(x.shape[-1], self.part.group_size):
            codes, scale, zero = quantize(x[..., channels].float(), self.part.bits, dim=3)
            out[..., channels] = codes.float().mul_(scale.float()).add_(zero.float())
        return out

    def read(self, rows: slice, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._read("key", rows, slice(first, last)), self._read("value", rows, slice(first, last))

    def _read(self, name: str, rows: slice, slots: slice) -> torch.Tensor:
        out = unpack(self.tensors[f"slot_{name}_codes"][rows, :, slots], self.part.bits, self.widths[name])
        for g, channels in enumerate(channel_groups(out.shape[-1], self.part.group_size)):
            out[..., channels].mul_(self.tensors[f"slot_{name}_scales"][rows, :, slots, g : g + 1].float())
            out[..., channels].add_(self.tensors[f"slot_{name}_zeros"][rows, :, slots, g : g + 1].float())
        return out

    def movable(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.tensors.values())
