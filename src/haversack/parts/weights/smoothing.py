"""Smoothing: how hard inputs and weights are to hold is shared between them, column by column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import Grid
from haversack.parts.weights.input_scale import InputScale, around_one

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SmoothingScale(InputScale):
    """Multiplies column c by `x_c^strength / w_c^(1 - strength)` and divides the input by it, with `x_c` the root mean square of its inputs and `w_c`
    the largest magnitude among its weights: stores `2 in` bytes. `strength` is from 0 to 1.

    Error: none but the rounding of scales to float16, which weights and inputs share: the product is unchanged. Source: Xiao et al. 2022 (arXiv
    2211.10438, equation 4), for weights alone as in Pan et al. 2023 (arXiv 2312.03788); differs in the root of the mean square in place of the largest
    input, and in keeping the scale beside the matrix.
    """

    id: ClassVar[str] = "smoothing"
    title: ClassVar[str] = "inputs smoothed into weights"
    source: ClassVar[Source | None] = Source(
        "Xiao, Lin, Seznec, Wu, Demouth, Han",
        2022,
        "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
        "2211.10438",
        "equation 4",
    )
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    lossless: ClassVar[bool] = True

    strength: float = 0.5

    def __post_init__(self) -> None:
        check_range(self.id, "strength", self.strength, "from 0 to 1", 0 <= self.strength <= 1)

    def inverse(self, weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
        inputs, weights = hessian.diagonal().clamp_min(0).sqrt(), weight.abs().amax(0)
        inputs, weights = (v.clamp_min(1e-5 * float(v.max().clamp_min(1e-30))) for v in (inputs, weights))
        return around_one(inputs.pow(self.strength) / weights.pow(1 - self.strength))
