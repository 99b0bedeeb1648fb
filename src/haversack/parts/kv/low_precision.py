"""Lower precision instead of dropping: tokens that no head chooses are packed to few bits and stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.ledger import StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.kv.base import Demote, PackedGroups, Regions
from haversack.parts.kv.quantized import BITS, QuantizedGroups, QuantizedKV

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LowPrecision(Demote):
    """Pack freed tokens to `bits`, each head's own tokens in groups as they are freed: keys per channel, values per token.

    Bytes and error of a demoted token: those of `kv.per-channel-keys` at the same bits, in groups of the selection's block. Differs from the source in that keys are scaled per
    channel within a group of tokens that were freed together, where the source balances channels once, and in that nothing is promoted again.
    """

    id: ClassVar[str] = "kv.low-precision"
    title: ClassVar[str] = "Tokens that matter less, at low precision instead of dropped"
    source: ClassVar[Source | None] = Source(
        "Yang et al.", 2024, "No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization", "2402.18096", "section 3"
    )  # fmt: skip

    bits: int = 2

    def __post_init__(self) -> None:
        check_range(self.id, "bits", self.bits, "8, 4 or 2", self.bits in BITS)

    @property
    def label(self) -> str:
        return f"rest at {self.bits} bits"

    def demoted_tokens(self, regions: Regions, capacity_tokens: int) -> int:
        blocks = -(-max(0, capacity_tokens - regions.slot_tokens + 1) // regions.block_tokens)
        return blocks * regions.block_tokens

    def _packed(self, regions: Regions) -> QuantizedKV:
        return QuantizedKV(self.bits, self.bits, regions.block_tokens, 0)

    def stored(self, site: AttentionSite, regions: Regions, *, batch_size: int) -> tuple[StoredTensor, ...]:
        num_groups = regions.demoted_tokens // regions.block_tokens
        return self._packed(regions).stored_groups(site, batch_size, num_groups)

    def store(self, site: AttentionSite, regions: Regions, tensors: dict[str, torch.Tensor]) -> PackedGroups:
        num_groups = regions.demoted_tokens // regions.block_tokens
        return QuantizedGroups(self._packed(regions), site, num_groups, tensors)
