"""Everything elsewhere: keys and values on another tier, which attends to them itself, or from which every step fetches them all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source
from haversack.parts.kv.attention import BLOCKWISE
from haversack.parts.kv.base import Attending, KVLayer, Regions, Represent
from haversack.parts.kv.layer import RingLayer
from haversack.parts.kv.plain import PlainKV
from haversack.parts.kv.slabs import allocate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Elsewhere(Represent):
    """Hold no key and no value on the device: all lie on the disk in the model's dtype. With `attends_there` the drive attends to them (computational storage), else every step fetches them.

    Bytes on the device: none; on the disk those of `kv.plain`. Over the link per step: the new token's keys and values, and queries and outputs with their log-sum-exp in float32, or every key and value held. Error:
    none; bit for bit `kv.plain`'s attention. A drive that computes is emulated: this machine's processor attends to the file's pages, and `crossed_bytes` counts what a link would carry; a plan takes the drive's speed from
    the machine file. Differs from the source in that every key is read, and that flash pages are not modelled.
    """

    id: ClassVar[str] = "kv.elsewhere"
    title: ClassVar[str] = "Keys and values on the disk, attended to there or fetched whole"
    source: ClassVar[Source | None] = Source(
        "Pan et al.", 2024, "InstInfer: In-Storage Attention Offloading for Cost-Effective Long-Context LLM Inference", "2409.04992", "section 4"
    )  # fmt: skip

    attends_there: bool = True

    @property
    def label(self) -> str:
        return "keys and values on disk, " + ("attended to there" if self.attends_there else "fetched whole per step")

    def stored(self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str) -> tuple[StoredTensor, ...]:
        plain = PlainKV().stored(site, regions, batch_size=batch_size, dtype=dtype)
        return tuple(replace(tensor, tier="disk") for tensor in plain)

    def link_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, held_tokens: int, dtype: str
    ) -> int:
        own, head_dims = DTYPE_BYTES[dtype], site.key_head_dim + site.value_head_dim
        new = site.num_kv_heads * head_dims * own
        if not self.attends_there:
            return batch_size * new * (min(held_tokens, regions.total_tokens) + 1)
        return batch_size * (new + site.num_heads * (head_dims * own + DTYPE_BYTES["F32"]))

    def read_there_bytes(self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str) -> int:
        if not self.attends_there:
            return 0
        return sum(t.num_bytes for t in self.stored(site, regions, batch_size=batch_size, dtype=dtype))

    def workspace_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, new_tokens: int, dtype: str
    ) -> int:
        """As `kv.plain` by blocks of any number of tokens: on an emulated tier it is this machine that computes."""
        sizes = {"batch_size": batch_size, "dtype": dtype}
        return max(PlainKV().workspace_bytes(site, regions, new_tokens=n, **sizes) for n in {new_tokens, 2})  # type: ignore[arg-type]

    def kernel_name(self, site: AttentionSite, regions: Regions, *, dtype: str) -> str:
        return "the drive" if self.attends_there else BLOCKWISE

    def build(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str, device: str | torch.device
    ) -> KVLayer:
        declared = self.stored(site, regions, batch_size=batch_size, dtype=dtype)
        layer = ElsewhereLayer(
            site,
            regions,
            batch_size=batch_size,
            ring_tokens=regions.recent_tokens,
            declared=declared,
            tensors=allocate(declared, device),
            rebuild=lambda rows: self.build(site, regions, batch_size=rows, dtype=dtype, device=device),
        )
        layer.attends_there = self.attends_there
        return layer


class ElsewhereLayer(RingLayer):
    """Slabs in a file. `crossed_bytes` is what went over the link since the layer was made, either way."""

    learns = True
    attends_there: bool
    crossed_bytes: int = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None = None) -> None:
        super().append(keys, values, real)
        self.crossed_bytes += keys.nbytes + values.nbytes

    def _attend(
        self, query: torch.Tensor, new_keys: torch.Tensor | None, new_values: torch.Tensor | None, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse = super()._attend(query, new_keys, new_values, how)
        if self.attends_there:
            self.crossed_bytes += query.nbytes + output.nbytes + lse.nbytes
        else:
            held = sum(min(count, self.regions.total_tokens) for count in self.counts)
            self.crossed_bytes += held * sum(t[0, :, :1].nbytes for t in self.tensors.values())
        return output, lse
