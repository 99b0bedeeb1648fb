"""Moments as codes of 8 or 4 bits with one scale per block of elements: a quarter or an eighth of AdamW's bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.codecs.moment_codes import MomentCode, make_moment_code
from haversack.ledger import StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.optimizer.base import Moment
from haversack.parts.optimizer.blockwise import BlockwiseState, scaled

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BlockState(BlockwiseState):
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
    min_elements: int = 4096

    def __post_init__(self) -> None:
        check_range(self.id, "bits", self.bits, "8 or 4", self.bits in (4, 8))
        super().__post_init__()

    def stored_blocks(self, name: str, num_elements: int, num_blocks: int) -> tuple[StoredTensor, ...]:
        return (
            StoredTensor(name, "U8", (-(-num_elements * self.bits // 8),)),
            StoredTensor(f"{name}_scale", "F32", (num_blocks,)),
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

    def read_blocks(
        self, stored: Mapping[str, torch.Tensor], shared: Mapping[str, torch.Tensor], moment: Moment, piece: slice
    ) -> torch.Tensor:
        values = self._code(shared, moment).decode(stored[moment.name][self._bytes(piece)])
        return scaled(
            values[: piece.stop - piece.start],
            stored[f"{moment.name}_scale"][self.blocks_of(piece)],
            self.block_size,
        )

    def write_blocks(
        self,
        stored: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        moment: Moment,
        piece: slice,
        blocks: torch.Tensor,
    ) -> None:
        import torch

        scales = torch.linalg.vector_norm(blocks, ord=float("inf"), dim=1)
        stored[f"{moment.name}_scale"][self.blocks_of(piece)] = scales
        shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes = self._code(shared, moment).encode(shares.view(-1))
        stored[moment.name][self._bytes(piece)] = codes[: -(-(piece.stop - piece.start) * self.bits // 8)]

    def _code(self, shared: Mapping[str, torch.Tensor], moment: Moment) -> MomentCode:
        names = (self._table("decode", moment.signed), self._table("encode", moment.signed))
        return MomentCode(self.bits, *(shared[name] for name in names))

    def _table(self, use: str, signed: bool) -> str:
        return f"{use} {'signed' if signed else 'unsigned'}"

    def _bytes(self, piece: slice) -> slice:
        return slice(piece.start * self.bits // 8, -(-piece.stop * self.bits // 8))
