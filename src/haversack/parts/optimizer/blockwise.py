"""What moments under one value per block have in common: where blocks lie, and which moments are too small for them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from haversack.ledger import StoredTensor
from haversack.parts.base import check_range
from haversack.parts.optimizer.base import Moment, StatePrecision

if TYPE_CHECKING:
    import torch


class BlockwiseState(StatePrecision):
    """Blocks of `block_size` numbers along the flattened moment, each under a scale of its own in 32 bits; moments of fewer than
    `min_elements` stay in 32 bits. Pieces that are read and written begin at multiples of `block_size`."""

    block_size: int
    min_elements: int

    def __post_init__(self) -> None:
        power = self.block_size >= 16 and self.block_size & (self.block_size - 1) == 0
        check_range(self.id, "block_size", self.block_size, "a power of two from 16", power)
        check_range(self.id, "min_elements", self.min_elements, "0 or more", self.min_elements >= 0)

    def stored(self, moment: Moment) -> tuple[StoredTensor, ...]:
        n = prod(moment.shape)
        if n < self.min_elements:
            return (StoredTensor(moment.name, "F32", moment.shape),)
        return self.stored_blocks(moment.name, n, -(-n // self.block_size))

    def read(
        self, stored: Mapping[str, torch.Tensor], shared: Mapping[str, torch.Tensor], moment: Moment, piece: slice
    ) -> torch.Tensor:
        import torch

        if f"{moment.name}_scale" not in stored:
            return stored[moment.name].view(-1)[piece].to(torch.float32, copy=True)
        return self.read_blocks(stored, shared, moment, piece)

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
        padding = -len(values) % self.block_size
        padded = torch.nn.functional.pad(values, (0, padding)) if padding else values
        self.write_blocks(stored, shared, moment, piece, padded.view(-1, self.block_size))

    @abstractmethod
    def stored_blocks(self, name: str, num_elements: int, num_blocks: int) -> tuple[StoredTensor, ...]:
        """The tensors of a moment in blocks, of which `NAME_scale` is one."""

    @abstractmethod
    def read_blocks(
        self, stored: Mapping[str, torch.Tensor], shared: Mapping[str, torch.Tensor], moment: Moment, piece: slice
    ) -> torch.Tensor:
        """A piece of a moment in blocks, a new float32 tensor."""

    @abstractmethod
    def write_blocks(
        self,
        stored: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        moment: Moment,
        piece: slice,
        blocks: torch.Tensor,
    ) -> None:
        """Store a piece, given as `(blocks, block_size)` with zeros where the last block is not full; `blocks` are left as they are."""

    def blocks_of(self, piece: slice) -> slice:
        """Which blocks a piece is made of."""
        return slice(piece.start // self.block_size, -(-piece.stop // self.block_size))


def scaled(values: torch.Tensor, scales: torch.Tensor, block_size: int) -> torch.Tensor:
    """Flat values times their blocks' scales, in place; the last block may be short."""
    whole = len(values) // block_size * block_size
    values[:whole].view(-1, block_size).mul_(scales[: whole // block_size, None])
    if whole < len(values):
        values[whole:].mul_(scales[-1])
    return values
