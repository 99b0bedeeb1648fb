"""Two tensors joined by a bond: rows and columns are each split in two, and one tensor holds the first halves, one the second."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import Correction, WeightTask

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorNetwork(Correction):
    """Adds the sum over `bond` (1 to 4096) of Kronecker products of two small matrices: stores `2 bond (out_1 in_1 + out_2 in_2)` bytes.

    `out = out_1 out_2` and `in = in_1 in_2`, the first factors being the largest divisors up to the root. Alone on a dropped grid it is the matrix; on any
    other it corrects what that left over. Error: that of cutting the singular values of the regrouped matrix `(out_1 in_1, out_2 in_2)` after `bond` of
    them, the least possible, and float16's. Source: Tomut et al. 2024 (arXiv 2401.14109): matrix product operators; differs in two tensors per matrix and
    in no training afterwards.
    """

    id: ClassVar[str] = "tensor-network"
    title: ClassVar[str] = "two tensors joined by a bond"
    source: ClassVar[Source | None] = Source(
        "Tomut, Jahromi, Sarkar, Kurt, Singh, Ishtiaq, Munoz, Bajaj, Elborady, del Bimbo, Alizadeh, Montero, Martin-Ramiro, Ibrahim, "
        "Tahiri Alaoui, Malcolm, Mugel, Orus",
        2024,
        "CompactifAI: Extreme Compression of Large Language Models using Quantum-Inspired Tensor Networks",
        "2401.14109",
    )

    bond: int = 64

    def __post_init__(self) -> None:
        check_range(self.id, "bond", self.bond, "from 1 to 4096", 1 <= self.bond <= 4096)

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        (out_1, out_2), (in_1, in_2) = _split(out_features), _split(in_features)
        bond = self._bond(out_features, in_features)
        return (StoredTensor("first", "F16", (bond, out_1, in_1)), StoredTensor("second", "F16", (bond, out_2, in_2)))

    def correct(self, task: WeightTask, approximation: torch.Tensor) -> dict[str, torch.Tensor]:
        from haversack.parts.weights.low_rank import leading_directions

        error = task.weight - approximation
        (out_1, out_2), (in_1, in_2) = _split(error.shape[0]), _split(error.shape[1])
        regrouped = error.view(out_1, out_2, in_1, in_2).transpose(1, 2).reshape(out_1 * in_1, out_2 * in_2)
        bond = self._bond(*error.shape)
        left, sizes, right = leading_directions(regrouped, bond)
        shared = sizes[:bond, None].sqrt()
        return {
            "first": (left.T[:bond] * shared).view(bond, out_1, in_1).half(),
            "second": (right[:bond] * shared).view(bond, out_2, in_2).half(),
        }

    def contribute(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor:
        import torch

        from haversack.kernels.decoded_tiles import matmul

        in_features = x.shape[-1]
        return matmul(
            x,
            lambda rows: self.rows(torch.arange(rows.start, rows.stop), tensors, in_features),
            out_features,
            self._row_bytes(out_features, in_features),
        )

    def rows(self, index: torch.Tensor, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        out_2 = tensors["second"].shape[1]
        first = tensors["first"][:, index // out_2].float()  # (bond, rows, in_1)
        second = tensors["second"][:, index % out_2].float()
        return (first.permute(1, 2, 0) @ second.permute(1, 0, 2)).view(len(index), in_features)

    def rows_bytes(self, num_rows: int, in_features: int) -> int:
        """The result and a copy of it; rows of both tensors as stored, in float32, and as products lay them out."""
        return num_rows * (8 * in_features + 10 * self.bond * sum(_split(in_features)) + 16)

    def workspace_bytes(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> int:
        from haversack.kernels.decoded_tiles import workspace_bytes

        tiles = workspace_bytes(
            self._row_bytes(out_features, in_features), num_tokens, out_features, in_features, dtype
        )
        return tiles + num_tokens * out_features * DTYPE_BYTES[dtype]

    def _row_bytes(self, out_features: int, in_features: int) -> int:
        return self.rows_bytes(1, in_features)

    def _bond(self, out_features: int, in_features: int) -> int:
        (out_1, out_2), (in_1, in_2) = _split(out_features), _split(in_features)
        return min(self.bond, out_1 * in_1, out_2 * in_2)


def _split(features: int) -> tuple[int, int]:
    """Two factors as near to each other as there are, the smaller first."""
    first = next(n for n in range(math.isqrt(features), 0, -1) if features % n == 0)
    return first, features // first
