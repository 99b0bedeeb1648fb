"""Low-rank correction: what a grid leaves over, or what it had better not hold, as a product of two thin matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import Correction, WeightTask

if TYPE_CHECKING:
    import torch

_DAMPING = 0.01
"""Share of the mean diagonal added to the statistics, as roundings do."""

_EXTRA_DIRECTIONS, _POWER_TURNS = 16, 6
"""Of the subspace in which the leading directions are looked for: how much wider than twice their number, and how often it is
turned."""


@dataclass(frozen=True)
class LowRankCorrection(Correction):
    """Adds `up @ down` to the grid's matrix: stores `2 rank (out + in)` bytes.

    `rank` (1 to 1024, at most the matrix's) singular directions of the error in the norm of the calibration statistics:
    with `H = R R^T` the best `up @ down R` of its rank to `error R`. Without statistics, of the error itself. With
    `rounds` above 1 (to 16) the matrix less the correction is rounded again and corrected again, in turns.

    Error: with one round, never more than without it in that norm, beyond the factors' rounding to float16. Source: Chai et al. 2023
    (arXiv 2306.08162, section 3.3: low-rank error correction), with turns Guo et al. 2023 (arXiv 2311.12023, algorithm 1);
    differs in taking singular directions of the output's error instead of training the factors.
    """

    id: ClassVar[str] = "low-rank"
    title: ClassVar[str] = "low-rank error correction"
    source: ClassVar[Source | None] = Source(
        "Guo, Greengard, Xing, Kim",
        2023,
        "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning",
        "2311.12023",
        "algorithm 1",
    )

    rank: int = 16
    rounds: int = 1

    def __post_init__(self) -> None:
        check_range(self.id, "rank", self.rank, "from 1 to 1024", 1 <= self.rank <= 1024)
        check_range(self.id, "rounds", self.rounds, "from 1 to 16", 1 <= self.rounds <= 16)

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        rank = self._rank(out_features, in_features)
        return (StoredTensor("up", "F16", (out_features, rank)), StoredTensor("down", "F16", (rank, in_features)))

    def correct(self, task: WeightTask, approximation: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        from haversack.parts.weights.damped_factor import damped_factor

        error = task.weight - approximation
        factor = None if task.hessian is None else damped_factor(task.hessian, _DAMPING, [])[0]
        rank = self._rank(*error.shape)
        left, sizes, right = leading_directions(error if factor is None else error @ factor, rank)
        shared = sizes[:rank].sqrt()
        down = shared[:, None] * right[:rank]
        if factor is not None:
            down = torch.linalg.solve_triangular(factor, down, upper=True, left=False)
        # Directions that no input has may come out large: each pair is balanced, so that float16 holds both.
        balance = (down.norm(dim=1) / (left[:, :rank] * shared).norm(dim=0).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
        return {"up": (left[:, :rank] * shared * balance).half(), "down": (down / balance[:, None]).half().contiguous()}

    def contribute(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor:
        return (x @ tensors["down"].to(x.dtype).t()) @ tensors["up"].to(x.dtype).t()

    def rows(self, index: torch.Tensor, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        return tensors["up"][index].float() @ tensors["down"].float()

    def rows_bytes(self, num_rows: int, in_features: int) -> int:
        """The result; rows of `up` as stored and in float32, and `down` in float32."""
        return 4 * in_features * (num_rows + self.rank) + 6 * num_rows * self.rank

    def workspace_bytes(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> int:
        """Both factors in the input's dtype and as oneDNN lays them out, what lies between them, the input and the result."""
        rank, size = self._rank(out_features, in_features), DTYPE_BYTES[dtype]
        return size * (2 * rank * (out_features + in_features) + num_tokens * (rank + out_features + in_features))

    def _rank(self, out_features: int, in_features: int) -> int:
        return min(self.rank, out_features, in_features)


def finds_every_direction(rows: int, columns: int, rank: int) -> bool:
    """Whether `leading_directions` finds all singular triples: a good part of them is wanted."""
    return 2 * (2 * rank + _EXTRA_DIRECTIONS) >= min(rows, columns)


def leading_directions(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """At least `rank` singular triples of `(rows, columns)`: left `(rows, n)`, sizes, right `(n, columns)`.

    By iterating a random subspace, where a small part of them is wanted (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm
    4.4): the errors of rounding have nearly flat spectra, so that the subspace is wide and turned often. The rest of the matrix
    was at most 0.1% larger than with all singular values, on Gaussian errors and on those of 2 to 4 bits.
    """
    import torch

    rows, columns = matrix.shape
    if finds_every_direction(rows, columns, rank):
        return torch.linalg.svd(matrix, full_matrices=False)
    wide = 2 * rank + _EXTRA_DIRECTIONS
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(matrix.shape[1], wide, generator=generator)
    for _ in range(_POWER_TURNS):
        basis = torch.linalg.qr(matrix @ basis).Q
        basis = torch.linalg.qr(matrix.T @ basis).Q
    left, sizes, right = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return left, sizes, right @ basis.T
