"""Activation-aware scales: columns that meet large inputs are enlarged before they are rounded, and their inputs shrunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import Grid
from haversack.parts.weights.input_scale import InputScale, around_one

if TYPE_CHECKING:
    import torch

_SEARCHED_ROWS = 256
"""Rows that a power is chosen on: what is gained belongs to columns, which all rows share."""


@dataclass(frozen=True)
class ActivationScale(InputScale):
    """Multiplies column c by `(mean square of its input)^(power / 2)` and divides the input by it: stores `2 in` bytes.

    The power is the best of `num_powers` (2 to 64) even steps from 0 to 1, by the output's error in the norm of the
    calibration statistics under nearest rounding on the option's own grid, on at most 256 rows. Power 0 is no scale at all,
    so that the search never loses.

    Error: none but the rounding of scales to float16, which weights and inputs share: the product is unchanged. Source: Lin et
    al. 2023 (arXiv 2306.00978, section 3.2); differs in the root of the mean square in place of the mean magnitude, and in
    keeping the scale beside the matrix instead of folding it into what comes before, which spares conditions on neighbours
    and costs one multiplication per input.
    """

    id: ClassVar[str] = "activation-scale"
    title: ClassVar[str] = "activation-aware scales of the inputs"
    source: ClassVar[Source | None] = Source(
        "Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han",
        2023,
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
        "2306.00978",
        "section 3.2",
    )
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    lossless: ClassVar[bool] = True

    num_powers: int = 20

    def __post_init__(self) -> None:
        check_range(self.id, "num_powers", self.num_powers, "from 2 to 64", 2 <= self.num_powers <= 64)

    def inverse(self, weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
        import torch

        mean_square = hessian.diagonal()
        rows = weight[:: max(1, len(weight) // _SEARCHED_ROWS)]
        best, best_error = torch.ones(weight.shape[1], dtype=torch.float16), float("inf")
        for step in range(self.num_powers):
            inverse = _power_of(mean_square, step / (self.num_powers - 1))
            factor = inverse.float()
            scaled = rows / factor
            scales = grid.fit(scaled, mean_square * factor.square())
            change = (grid.dequantize(grid.quantize(scaled, scales), scales) - scaled) * factor
            error = float(((change @ hessian) * change).sum())
            if error < best_error:
                best, best_error = inverse, error
        return best


def _power_of(mean_square: torch.Tensor, power: float) -> torch.Tensor:
    return around_one(mean_square.clamp_min(1e-10 * float(mean_square.max().clamp_min(1e-30))).pow(power / 2))
