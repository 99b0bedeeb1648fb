"""Moments as codes of 8 or 4 bits with one scale per block of elements: a quarter or an eighth of AdamW's bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from haversack.codecs.moment_codes import MomentCode, make_moment_code
from haversack.ledger import StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.optimizer.base import Moment, StatePrecision

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BlockState(StatePrecision):
    """`bits / 8 + 4 / block_size` bytes of a number; moments of fewer than `min_elements` stay in 32 bits.

    Blocks run along the flattened moment, each under its largest magnitude. At 8 bits codes are dynamic (an exponent of a
    length of its own, then a linear fraction); at 4 bits so for moments with a sign, and linear without zero for others.
    Error: half a step of the code, relative to the block's largest number. Source: Dettmers et al. 2021, arXiv 2110.02861,
    section 2 (8 bits, blocks of 2,048 there, 256 in its later program); Li et al. 2023, arXiv 2309.01507, section 3 (4 bits,
    blocks of 128).
    """

    id: ClassVar[str] = "block-state"
    title: ClassVar[str] = "moments as codes of 8 or 4 bits under one scale per block"
    source: ClassVar[Source] = Source(
        "Dettmers, Lewis, Shleifer and Zettlemoyer",
        2021,
        "8-bit Optimizers via Block-wise Quantization",
        "2110.02861",
        "section 2",
    )

    bits: int = 8
    block_size: int = 256
    """Pieces that are read and written begin at multiples of it."""
    min_elements: int = 4096

    def __post_init__(self) -> None:
        check_range(self.id, "bits", self.bits, "8 or 4", self.bits in (4, 8))
        power = self.block_size >= 16 and self.block_size & (self.block_size - 1) == 0
        check_range(self.id, "block_size", self.block_size, "a power of two from 16", power)
        check_range(self.id, "min_elements", self.min_elements, "0 or more", self.min_elements >= 0)

    def stored(self, moment: Moment) -> tuple[StoredTensor, ...]:
        n = prod(moment.shape)
        if n < self.min_elements:
            return (StoredTensor(moment.name, "F32", moment.shape),)
        blocks = -(-n // self.block_size)
        return (
            StoredTensor(moment.name, "U8", (-(-n * self.bits // 8),)),
            StoredTensor(f"{moment.name}_scale", "F32", (blocks,)),
        )

    def shared(self) -> dict[str, torch.Tensor]:
        tables: dict[str, torch.Tensor] = {}
        for signed in (False, True):
            code = make_moment_code(self.bits, signed)
            tables |= {
                self._table("decode", signed): code.decode_table,
                self._table("encode", signed): code.encode_table,
            }
        return tables

    def read(
        self, stored: Mapping[str, torch.Tensor], shared: Mapping[str, torch.Tensor], moment: Moment, piece: slice
    ) -> torch.Tensor:
        import torch

        codes = stored[moment.name]
        if f"{moment.name}_scale" not in stored:
            return codes.view(-1)[piece].to(torch.float32, copy=True)
        values = self._code(shared, moment).decode(codes[self._bytes(piece)])
        scales = stored[f"{moment.name}_scale"][self._blocks(piece)]
        n = piece.stop - piece.start
        whole = n // self.block_size * self.block_size
        values[:whole].view(-1, self.block_size).mul_(scales[: whole // self.block_size, None])
        if whole < n:
            values[whole:].mul_(scales[-1])
        return values[:n]

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
        n = len(values)
        padding = -n % self.block_size
        padded = torch.nn.functional.pad(values, (0, padding)) if padding else values
        blocks = padded.view(-1, self.block_size)
        scales = torch.linalg.vector_norm(blocks, ord=float("inf"), dim=1)
        stored[f"{moment.name}_scale"][self._blocks(piece)] = scales
        shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        stored[moment.name][self._bytes(piece)] = self._code(shared, moment).encode(shares.view(-1))[
            : -(-n * self.bits // 8)
        ]

    def _code(self, shared: Mapping[str, torch.Tensor], moment: Moment) -> MomentCode:
        names = (self._table("decode", moment.signed), self._table("encode", moment.signed))
        return MomentCode(self.bits, *(shared[name] for name in names))

    def _table(self, use: str, signed: bool) -> str:
        return f"{use} {'signed' if signed else 'unsigned'}"

    def _bytes(self, piece: slice) -> slice:
        return slice(piece.start * self.bits // 8, -(-piece.stop * self.bits // 8))

    def _blocks(self, piece: slice) -> slice:
        return slice(piece.start // self.block_size, -(-piece.stop // self.block_size))
