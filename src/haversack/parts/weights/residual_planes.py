"""Residual planes: what a grid left over, as matrices of signs one after another, each of what those before it left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import Rounding, Stack, WeightTask, strip
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.parts.weights.nearest import NearestRounding
from haversack.parts.weights.sign_planes import SignPlanes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ResidualPlanes(Stack):
    """Adds `blocks` (1 to 12) of `bits` (1 to 4) planes of signs to the grid's matrix: stores `bits + 16 / group_size` bits per weight and block.

    Each block has one float16 scale per group of `group_size` (32, 64 or 128) columns and is rounded with second-order feedback where
    statistics are known, to the nearest value where not. So the first blocks of a longer stack are the shorter stack, bit for bit,
    and every one is a product of its own with the kernels of bit planes. Error: falls with every block on matrices met, but more slowly than with
    a code's bits, for feedback leaves more over than it found: after two bits, 2.25 more take the damage to a fifth where a 4-bit code is at a fourteenth
    (one matrix of 1,536 by 512). Source: Park et al. 2024 (arXiv 2402.10517: models of fewer bits inside one of more); differs in scales of each block's own, where the source splits
    the values of a table.
    """

    id: ClassVar[str] = "residual-planes"
    title: ClassVar[str] = "planes of signs for what a grid left over, one after another"
    source: ClassVar[Source | None] = Source(
        "Park, Hyun, Cho, Sim, Lee",
        2024,
        "Any-Precision LLM: Low-Cost Deployment of Multiple, Different-Sized LLMs",
        "2402.10517",
        "section 3",
    )

    blocks: int = 2
    group_size: int = 64
    bits: int = 2

    def __post_init__(self) -> None:
        check_range(self.id, "blocks", self.blocks, "from 1 to 12", 1 <= self.blocks <= 12)
        check_range(self.id, "group_size", self.group_size, "32, 64 or 128", self.group_size in (32, 64, 128))
        check_range(self.id, "bits", self.bits, "from 1 to 4", self.bits in range(1, 5))

    @property
    def plane(self) -> SignPlanes:
        """The grid of one block."""
        return SignPlanes(self.bits, self.group_size)

    def shortened(self, blocks: int) -> ResidualPlanes:
        return replace(self, blocks=blocks)

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        block = self.plane.stored(out_features, in_features)
        return tuple(tensor.prefixed(str(number)) for number in range(self.blocks) for tensor in block)

    def correct(self, task: WeightTask, approximation: torch.Tensor) -> dict[str, torch.Tensor]:
        grid = self.plane
        rounding: Rounding = NearestRounding() if task.hessian is None else HessianFeedback()
        found: dict[str, torch.Tensor] = {}
        for number in range(self.blocks):
            codes, scales = rounding.round(replace(task, weight=task.weight - approximation, notes=[]), grid)
            found |= {f"{number}.{name}": tensor for name, tensor in grid.pack(codes, scales).items()}
            approximation = approximation + grid.dequantize(codes, scales)
        return found

    def contribute(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor:
        grid = self.plane
        total = grid.matmul(x, strip(tensors, "0."), out_features)
        for number in range(1, self.blocks):
            total += grid.matmul(x, strip(tensors, f"{number}."), out_features)
        return total

    def rows(self, index: torch.Tensor, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        grid = self.plane
        total = grid.rows(index, strip(tensors, "0."), in_features)
        for number in range(1, self.blocks):
            total += grid.rows(index, strip(tensors, f"{number}."), in_features)
        return total

    def rows_bytes(self, num_rows: int, in_features: int) -> int:
        """The result, and a plane's rows while they are made."""
        return self.plane.rows_bytes(num_rows, in_features) + 4 * num_rows * in_features * (self.blocks > 1)

    def workspace_bytes(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> int:
        """The result, a plane's product before it is added, and what its kernel takes."""
        products = (1 + (self.blocks > 1)) * num_tokens * out_features * DTYPE_BYTES[dtype]
        return products + self.plane.workspace_bytes(num_tokens, out_features, in_features, dtype)
