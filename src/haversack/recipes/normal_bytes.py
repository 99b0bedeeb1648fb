"""Normal tables of 256 values: bytes whose values lie dense where weights do."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    grids = (CodebookGrid("max8", 0), CodebookGrid("max8", 128), CodebookGrid("max8", 32, "u4"))
    return tuple(WeightOption(grid, HessianFeedback()) for grid in grids)


RECIPE = Recipe(
    id="normal-bytes",
    resident="weights",
    title="Max's normal quantizer of 256 values, rounded with second-order feedback",
    source=Source("Max", 1960, "Quantizing for minimum distortion", None, "table 1"),
    options=options,
    candidates=False,  # until kernels read tables of 256 values: decoding tiles costs many times the time
)
