"""Normal tables: the values of least error for bell-shaped weights, one scale per group, second-order feedback."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(
        WeightOption(grid=CodebookGrid(values, 64), rounding=HessianFeedback()) for values in ("max2", "max3", "max4")
    )


RECIPE = Recipe(
    id="normal-tables",
    resident="weights",
    title="Max's normal quantizer in groups of 64, rounded with second-order feedback",
    source=Source("Max", 1960, "Quantizing for minimum distortion", None, "table 1"),
    options=options,
)
