"""Normal tables in superblocks: the values of least error for bell-shaped weights, small groups, second-order feedback."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(
        WeightOption(grid=CodebookGrid(values, group_size, "u4"), rounding=HessianFeedback())
        for values in ("max2", "max3", "max4")
        for group_size in (32, 16)
    )


RECIPE = Recipe(
    id="normal-superblocks",
    resident="weights",
    title="Max's normal quantizer in groups of 16 and 32 with 4-bit scales, rounded with second-order feedback",
    source=Source("Max", 1960, "Quantizing for minimum distortion", None, "table 1"),
    options=options,
)
