"""The gradient's leading singular vectors in 4 bits, made anew ever less often where they no longer change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.optimizer.base import StatePrecision, Subspace
from haversack.parts.optimizer.integer_state import IntegerState
from haversack.parts.optimizer.singular_vectors import leading_directions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LazySingularVectors(Subspace):
    """Of `(short, long)`: a basis of `short * rank` integers of `bits` bits, and moments of `rank * long`.

    Each matrix begins with a basis every `refresh_steps` steps. Where the last `patience` new ones lay in the span of those before them by more than `similarity`, the interval doubles: layers that have settled need fewer
    decompositions. Similarity is the mean squared cosine of the principal angles between both spans, less what random ones share, 1 for the same span. Source: Zhang et al.
    2024, arXiv 2407.08296, sections 3.2 and 3.3 (4 bits, a threshold of 0.4, twice the interval); differs in that whole spans are compared, where its program compares the first vectors.
    """

    id: ClassVar[str] = "lazy-singular-vectors"
    title: ClassVar[str] = "moments in the span of 4-bit singular vectors, refreshed the less the more settled they are"
    source: ClassVar[Source] = Source(
        "Zhang, Jaiswal, Yin, Liu, Zhao, Tian and Wang",
        2024,
        "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients",
        "2407.08296",
        "sections 3.2 and 3.3",
    )

    keeps_basis: ClassVar[bool] = True
    scalars: ClassVar[tuple[str, ...]] = ("refresh_at", "interval", "similar_refreshes")

    rank: float = 0.25
    refresh_steps: int = 200
    bits: int = 4
    similarity: float = 0.4
    patience: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.id, "bits", self.bits, "8 or 4", self.bits in (4, 8))
        check_range(self.id, "similarity", self.similarity, "from 0 to 1", 0 <= self.similarity <= 1)
        check_range(self.id, "patience", self.patience, "1 or more", self.patience >= 1)

    def basis_precision(self, state: StatePrecision | None) -> StatePrecision | None:
        return IntegerState(self.bits)

    def refreshes(self, step: int, scalars: Mapping[str, torch.Tensor]) -> bool:
        return step == 1 or step >= int(scalars["refresh_at"].item())

    def refreshed(
        self, step: int, scalars: Mapping[str, torch.Tensor], before: torch.Tensor, made: torch.Tensor
    ) -> None:
        if step == 1:
            scalars["interval"].fill_(self.refresh_steps)
        elif self._similarity(before, made) > self.similarity:
            scalars["similar_refreshes"].add_(1)
        else:
            scalars["similar_refreshes"].zero_()
        if int(scalars["similar_refreshes"].item()) >= self.patience:
            scalars["interval"].mul_(2)
            scalars["similar_refreshes"].zero_()
        scalars["refresh_at"].copy_(scalars["interval"]).add_(step)

    def _similarity(self, before: torch.Tensor, made: torch.Tensor) -> float:
        short, rank = made.shape
        shared = (before.T @ made).square_().sum() / (before.square().sum() / rank).clamp(min=1e-30) / rank
        random = rank / short
        return 1.0 if rank == short else (float(shared) - random) / (1 - random)

    def basis(self, grad: torch.Tensor, step: int, seed: int) -> torch.Tensor:
        return leading_directions(grad, self.rank_of(len(grad)))

    def reduce(self, grad: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        return basis.T @ grad

    def expand(self, reduced: torch.Tensor, basis: torch.Tensor, short: int) -> torch.Tensor:
        return basis @ reduced
