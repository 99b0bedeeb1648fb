"""A random choice of a matrix's rows (of its shorter side), drawn anew now and then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source
from haversack.parts.optimizer.base import Subspace

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RandomRows(Subspace):
    """Of `(short, long)`: moments of `rank` rows, `rank * long` numbers; which rows is brought back from the seed.

    Moments begin again with each choice. Source: Zmushko et al. 2024, arXiv 2411.07837, section 3 (the choice by columns);
    differs in that lines across the shorter side are chosen, so that they are whole lines of memory or strided alike.
    """

    id: ClassVar[str] = "random-rows"
    title: ClassVar[str] = "moments of a random choice of rows, drawn again from its seed"
    source: ClassVar[Source] = Source(
        "Zmushko, Beznosikov, Takac and Horvath",
        2024,
        "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
        "2411.07837",
        "section 3",
    )
    resets_moments: ClassVar[bool] = True

    rank: float = 0.25
    refresh_steps: int = 200

    def basis(self, grad: torch.Tensor, step: int, seed: int) -> torch.Tensor:
        import torch

        short = grad.shape[0]
        generator = torch.Generator().manual_seed(seed * 2**31 + (step - 1) // self.refresh_steps)
        order = torch.randperm(short, generator=generator)
        return order[: self.rank_of(short)].sort().values.to(grad.device)

    def reduce(self, grad: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        return grad.index_select(0, basis)

    def expand(self, reduced: torch.Tensor, basis: torch.Tensor, short: int) -> torch.Tensor:
        return reduced.new_zeros(short, reduced.shape[1]).index_copy_(0, basis, reduced)
