"""Moments as 8-bit floats whose exponents are stretched, group by group, over all that such a float can say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log, prod
from typing import TYPE_CHECKING, ClassVar

from haversack.ledger import StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.optimizer.base import Moment, StatePrecision

if TYPE_CHECKING:
    import torch

LARGEST, RANGE = 448.0, 448.0 * 2**9
"""Of e4m3: its largest number, and that over its smallest."""


@dataclass(frozen=True)
class ExpandedFloat8(StatePrecision):
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
        power = self.block_size >= 16 and self.block_size & (self.block_size - 1) == 0
        check_range(self.id, "block_size", self.block_size, "a power of two from 16", power)
        check_range(self.id, "min_elements", self.min_elements, "0 or more", self.min_elements >= 0)
        check_range(self.id, "expand", self.expand, "true or false", isinstance(self.expand, bool))

    def stored(self, moment: Moment) -> tuple[StoredTensor, ...]:
        n = prod(moment.shape)
        if n < self.min_elements:
            return (StoredTensor(moment.name, "F32", moment.shape),)
        blocks = -(-n // self.block_size)
        kept = ["scale", "power"] if self.expand else ["scale"]
        beside = (StoredTensor(f"{moment.name}_{name}", "F32", (blocks,)) for name in kept)
        return (StoredTensor(moment.name, "F8_E4M3", (n,)), *beside)

    def read(
        self, stored: Mapping[str, torch.Tensor], shared: Mapping[str, torch.Tensor], moment: Moment, piece: slice
    ) -> torch.Tensor:
        import torch

        values = stored[moment.name].view(-1)[piece].to(torch.float32, copy=True)
        if f"{moment.name}_scale" not in stored:
            return values
        blocks = self._blocks(values)
        if self.expand:
            powers = stored[f"{moment.name}_power"][self._block_slice(piece), None]
            roots = (blocks.abs() / LARGEST).pow_(1 / powers.clamp(min=torch.finfo(torch.float32).tiny))
            blocks = roots.mul_(blocks.sign())
        else:
            blocks = blocks / LARGEST
        blocks = blocks * stored[f"{moment.name}_scale"][self._block_slice(piece), None]
        return blocks.view(-1)[: len(values)]

    def write(
        self,
        stored: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        moment: Moment,
        piece: slice,
        values: torch.Tensor,
    ) -> None:
        import torch

        values = values.reshape(-1)
        if f"{moment.name}_scale" not in stored:
            stored[moment.name].view(-1)[piece].copy_(values)
            return
        blocks = self._blocks(values)
        shares = blocks.abs()
        most = shares.amax(1, keepdim=True)
        stored[f"{moment.name}_scale"][self._block_slice(piece)] = most[:, 0]
        shares = shares / most.clamp(min=torch.finfo(torch.float32).tiny)
        if self.expand:
            least = shares.masked_fill(shares == 0, 1.0).amin(1, keepdim=True)
            powers = (log(RANGE) / -least.log()).clamp_(max=LARGEST)  # numbers that are all alike need no stretching
            stored[f"{moment.name}_power"][self._block_slice(piece)] = powers[:, 0]
            shares = shares.pow_(powers)
        codes = shares.mul_(LARGEST).mul_(blocks.sign()).view(-1)[: len(values)]
        stored[moment.name][piece] = codes.to(torch.float8_e4m3fn)

    def _blocks(self, values: torch.Tensor) -> torch.Tensor:
        """`(blocks, block_size)`, padded with zeros."""
        import torch

        padding = -len(values) % self.block_size
        return (torch.nn.functional.pad(values, (0, padding)) if padding else values).view(-1, self.block_size)

    def _block_slice(self, piece: slice) -> slice:
        return slice(piece.start // self.block_size, -(-piece.stop // self.block_size))
