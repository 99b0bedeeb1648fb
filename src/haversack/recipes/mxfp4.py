"""MXFP4: 4-bit floats under a power of two per 32 columns."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return (WeightOption(grid=CodebookGrid("fp4", 32, "e8m0"), rounding=NearestRounding()),)


RECIPE = Recipe(
    id="mxfp4",
    resident="weights",
    title="e2m1 values under a power of two per 32 columns",
    source=Source("Rouhani et al.", 2023, "Microscaling Data Formats for Deep Learning", "2310.10537", "section 4"),
    options=options,
    candidates=False,
)
