"""fp8 storage: e4m3 values under one scale per row."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return (WeightOption(grid=CodebookGrid("fp8", 0, search=False), rounding=NearestRounding()),)


RECIPE = Recipe(
    id="fp8",
    resident="weights",
    title="e4m3 values, scales by each row's extreme",
    source=Source("Micikevicius et al.", 2022, "FP8 Formats for Deep Learning", "2209.05433", "section 5"),
    options=options,
    candidates=False,
)
