"""Moments as 8-bit floats whose exponents are stretched, group by group, over all that such a float can say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, ClassVar

from haversack.ledger import StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.optimizer.base import Moment
from haversack.parts.optimizer.blockwise import BlockwiseState

if TYPE_CHECKING:
    import torch

LARGEST, RANGE = 448.0, 448.0 * 2**9
"""Of e4m3: its largest number, and that over its smallest."""


@dataclass(frozen=True)
class ExpandedFloat8(BlockwiseState):
    """`1 + 8 / block_size` bytes of a number; moments of fewer than `min_elements` stay in 32 bits.

    A number x of a block is stored as `sign(x) (|x| / m)^k` times 448, rounded to e4m3, with `m` the block's largest magnitude and `k` such that its smallest (other than
    0) becomes e4m3's smallest; without `expand`, k is 1. Error: up to 1/16 of a number's k-th power, so 1/16 over k of the number, for what lies above e4m3's
    subnormal numbers. Source: Xi et al. 2024, arXiv 2410.19313, section 4 (blocks of 128); scales and exponents are kept in 32 bits.
    """

    id: ClassVar[str] = "expanded-float8"
    title: ClassVar[str] = "moments as 8-bit floats whose exponents are stretched over their range"
    source: ClassVar[Source] = Source(
        "Xi, Cai, Zhu, Lu, Keutzer, Chen and Han",
        2024,
        "COAT: Compressing Optimizer states and Activation for Memory-Efficient FP8 Training",
        "2410.19313",
        "section 4",
    )

    block_size: int = 128
    min_elements: int = 4096
    expand: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.id, "expand", self.expand, "true or false", isinstance(self.expand, bool))

    def stored_blocks(self, name: str, num_elements: int, num_blocks: int) -> tuple[StoredTensor, ...]:
        kept = ["scale", "power"] if self.expand else ["scale"]
        beside = (StoredTensor(f"{name}_{what}", "F32", (num_blocks,)) for what in kept)
        return (StoredTensor(name, "F8_E4M3", (num_elements,)), *beside)

    def read_blocks(
        self, stored: Mapping[str, torch.Tensor], shared: Mapping[str, torch.Tensor], moment: Moment, piece: slice
    ) -> torch.Tensor:
        import torch

        values = stored[moment.name].view(-1)[piece].to(torch.float32, copy=True)
        n, own = len(values), self.blocks_of(piece)
        padding = -n % self.block_size
        blocks = (torch.nn.functional.pad(values, (0, padding)) if padding else values).view(-1, self.block_size)
        if self.expand:
            powers = stored[f"{moment.name}_power"][own, None]
            roots = (blocks.abs() / LARGEST).pow_(1 / powers.clamp(min=torch.finfo(torch.float32).tiny))
            blocks = roots.mul_(blocks.sign())
        else:
            blocks = blocks / LARGEST
        blocks = blocks * stored[f"{moment.name}_scale"][own, None]
        return blocks.view(-1)[:n]

    def write_blocks(
        self,
        stored: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        moment: Moment,
        piece: slice,
        blocks: torch.Tensor,
    ) -> None:
        import torch

        shares, own = blocks.abs(), self.blocks_of(piece)
        most = shares.amax(1, keepdim=True)
        stored[f"{moment.name}_scale"][own] = most[:, 0]
        shares = shares / most.clamp(min=torch.finfo(torch.float32).tiny)
        if self.expand:
            least = shares.masked_fill(shares == 0, 1.0).amin(1, keepdim=True)
            powers = log(RANGE) / least.log().neg_().clamp_(min=log(RANGE) / LARGEST)  # those all alike need none
            stored[f"{moment.name}_power"][own] = powers[:, 0]
            shares = shares.pow_(powers)
        codes = shares.mul_(LARGEST).mul_(blocks.sign()).view(-1)[: piece.stop - piece.start]
        stored[moment.name][piece] = codes.to(torch.float8_e4m3fn)
