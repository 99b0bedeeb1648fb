"""Activation-aware scales: columns that meet large inputs are enlarged before they are rounded, and their inputs shrunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.errors import UsageError
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import Grid, Transform, WeightTask

if TYPE_CHECKING:
    import torch

_SEARCHED_ROWS = 256
"""Rows that a power is chosen on: what is gained belongs to columns, which all rows share."""


@dataclass(frozen=True)
class ActivationScale(Transform):
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

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        return (StoredTensor("inverse", "F16", (in_features,)),)

    def apply(self, task: WeightTask, grid: Grid) -> dict[str, torch.Tensor]:
        import torch

        if task.hessian is None:
            raise UsageError(
                f"{self.id}: scales follow calibration statistics and this site has none; calibrate first."
            )
        rows = task.weight[:: max(1, len(task.weight) // _SEARCHED_ROWS)]
        best, best_error = torch.ones(task.weight.shape[1], dtype=torch.float16), float("inf")
        for step in range(self.num_powers):
            inverse = self._inverse(task.hessian.diagonal(), step / (self.num_powers - 1))
            factor = inverse.float()
            scaled = rows / factor
            scales = grid.fit(scaled, task.hessian.diagonal() * factor.square())
            change = (grid.dequantize(grid.quantize(scaled, scales), scales) - scaled) * factor
            error = float(((change @ task.hessian) * change).sum())
            if error < best_error:
                best, best_error = inverse, error
        factor = best.float()
        task.weight = task.weight / factor
        task.hessian = factor[:, None] * task.hessian * factor
        return {"inverse": best}

    def transform_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return x * tensors["inverse"].to(x.dtype)

    def restore_rows(self, rows: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return rows * tensors["inverse"].float()

    def workspace_bytes(self, num_tokens: int, in_features: int, dtype: str) -> int:
        """The scaled input, and the scales in its dtype."""
        return (num_tokens + 1) * in_features * DTYPE_BYTES[dtype]

    def _inverse(self, mean_square: torch.Tensor, power: float) -> torch.Tensor:
        """What inputs are multiplied by, float16 `(in,)`: around 1, so that neither side overflows."""
        scale = mean_square.clamp_min(1e-10 * float(mean_square.max().clamp_min(1e-30))).pow(power / 2)
        middle = (scale.max() * scale.min()).sqrt()
        return (middle / scale).clamp(2.0**-14, 2.0**14).half()
