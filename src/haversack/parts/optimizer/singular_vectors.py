"""The leading singular vectors of the gradient, made anew now and then: the subspace in which it moves most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source
from haversack.parts.optimizer.base import Subspace

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SingularVectors(Subspace):
    """Of `(short, long)`: a basis of `short * rank` numbers and moments of `rank * long`.

    Source: Zhao et al. 2024, arXiv 2403.03507, algorithm 2. Differs in that the vectors come from the gradient's product with
    itself `(short, short)`, in float32; the basis is stored as moments are; and GaLore's factor of 0.25 is left to the learning rate.
    Moments go on in the new basis, as there.
    """

    id: ClassVar[str] = "singular-vectors"
    title: ClassVar[str] = "moments in the span of the gradient's leading singular vectors"
    source: ClassVar[Source] = Source(
        "Zhao, Zhang, Chen, Wang, Anandkumar and Tian",
        2024,
        "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
        "2403.03507",
        "algorithm 2",
    )

    keeps_basis: ClassVar[bool] = True

    rank: float = 0.25
    refresh_steps: int = 200

    def basis(self, grad: torch.Tensor, step: int, seed: int) -> torch.Tensor:
        return leading_directions(grad, self.rank_of(len(grad)))

    def reduce(self, grad: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        return basis.T @ grad

    def expand(self, reduced: torch.Tensor, basis: torch.Tensor, short: int) -> torch.Tensor:
        return basis @ reduced


def leading_directions(grad: torch.Tensor, rank: int) -> torch.Tensor:
    """The leading left singular vectors of `(short, long)`, float32 `(short, rank)`."""
    import torch

    g = grad.float()
    return torch.linalg.eigh(g @ g.T).eigenvectors[:, -rank:]  # their values rise
