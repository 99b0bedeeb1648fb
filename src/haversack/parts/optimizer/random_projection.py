"""A random projection of the gradient, brought back from its seed: nothing of the basis is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source
from haversack.parts.optimizer.base import Subspace

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RandomProjection(Subspace):
    """Of `(short, long)`: moments of `rank * long` numbers. Norms of columns are kept on average.

    Entries are normal with variance `1 / rank`. The same seed gives the same projection until it is refreshed; it is drawn
    on the host, so that devices agree. Source: Zhu et al. 2024, arXiv 2412.05270, section 4.1.
    """

    id: ClassVar[str] = "random-projection"
    title: ClassVar[str] = "moments of a random projection that is drawn again from its seed"
    source: ClassVar[Source] = Source(
        "Zhu, Zhang, Cong, Liu, Park, Chandra, Long, Pan, Wang and Lee",
        2024,
        "APOLLO: SGD-like Memory, AdamW-level Performance",
        "2412.05270",
        "section 4.1",
    )

    rank: float = 0.25
    refresh_steps: int = 200

    def basis(self, grad: torch.Tensor, step: int, seed: int) -> torch.Tensor:
        import torch

        short = grad.shape[0]
        rank = self.rank_of(short)
        generator = torch.Generator().manual_seed(seed * 2**31 + (step - 1) // self.refresh_steps)
        drawn = torch.randn(short, rank, generator=generator).mul_(rank**-0.5)
        return drawn.to(grad.device)

    def reduce(self, grad: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        return basis.T @ grad

    def expand(self, reduced: torch.Tensor, basis: torch.Tensor, short: int) -> torch.Tensor:
        return basis @ reduced
