"""Numbers as integers of 8 or 4 bits an even step apart, one scale per block; to the nearest, or up and down at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.ledger import StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.optimizer.base import Moment
from haversack.parts.optimizer.blockwise import BlockwiseState, scaled

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class IntegerState(BlockwiseState):
    """`bits / 8 + 4 / block_size` bytes of a number; what has fewer than `min_elements` stays in 32 bits.

    A block's step is its largest magnitude over `2^(bits - 1) - 1`. Error: half a step to the nearest; a step at most if `stochastic`, where a number goes up with the chance of its
    distance from the integer below, so that what is stored is right on average and steps far below one are not lost (torch's generator draws). Meant for bases and weights: second moments want codes that are
    fine near zero. Source: Zhang et al. 2024, arXiv 2407.08296, section 3.2 (4-bit projections) and 3.4 (8-bit weights); differs in that integers are symmetric.
    """

    id: ClassVar[str] = "integer-state"
    title: ClassVar[str] = "integers of 8 or 4 bits under one scale per block, to the nearest or at random"
    source: ClassVar[Source] = Source(
        "Zhang, Jaiswal, Yin, Liu, Zhao, Tian and Wang",
        2024,
        "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients",
        "2407.08296",
        "sections 3.2 and 3.4",
    )

    bits: int = 4
    block_size: int = 256
    min_elements: int = 0
    stochastic: bool = False

    def __post_init__(self) -> None:
        check_range(self.id, "bits", self.bits, "8 or 4", self.bits in (4, 8))
        check_range(self.id, "stochastic", self.stochastic, "true or false", isinstance(self.stochastic, bool))
        super().__post_init__()

    @property
    def largest(self) -> int:
        """The largest integer."""
        return 2 ** (self.bits - 1) - 1

    def stored_blocks(self, name: str, num_elements: int, num_blocks: int) -> tuple[StoredTensor, ...]:
        return (
            StoredTensor(name, "I8" if self.bits == 8 else "U8", (-(-num_elements * self.bits // 8),)),
            StoredTensor(f"{name}_scale", "F32", (num_blocks,)),
        )

    def read_blocks(
        self, stored: Mapping[str, torch.Tensor], shared: Mapping[str, torch.Tensor], moment: Moment, piece: slice
    ) -> torch.Tensor:
        import torch

        codes = stored[moment.name][self._bytes(piece)]
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], 1).view(-1)
        values = codes.to(torch.float32)
        if self.bits == 4:
            values.sub_(8)
        return scaled(
            values[: piece.stop - piece.start], stored[f"{moment.name}_scale"][self.blocks_of(piece)], self.block_size
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

        scales = torch.linalg.vector_norm(blocks, ord=float("inf"), dim=1).div_(self.largest)
        stored[f"{moment.name}_scale"][self.blocks_of(piece)] = scales
        steps = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        steps = steps.add_(torch.rand_like(steps)).floor_() if self.stochastic else steps.round_()
        codes = steps.clamp_(-self.largest, self.largest).view(-1)[: piece.stop - piece.start]
        if self.bits == 8:
            stored[moment.name][piece] = codes.to(torch.int8)
            return
        codes = torch.nn.functional.pad(codes.add_(8), (0, len(codes) % 2)).to(torch.uint8).view(-1, 2)
        stored[moment.name][self._bytes(piece)] = codes[:, 0] | codes[:, 1] << 4

    def _bytes(self, piece: slice) -> slice:
        return slice(piece.start * self.bits // 8, -(-piece.stop * self.bits // 8))
