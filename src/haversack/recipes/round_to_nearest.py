"""Round to nearest on a per-group integer grid: the baseline that needs no data."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(
        WeightOption(
            grid=IntegerGrid(bits=bits, group_size=group_size, symmetric=symmetric), rounding=NearestRounding()
        )
        for bits in (2, 3, 4, 8)
        for group_size in (128, 64)
        for symmetric in (True, False)
    )


RECIPE = Recipe(
    id="round-to-nearest",
    resident="weights",
    title="nearest codes on an integer grid per group, scales by clipping search",
    source=Source("Dettmers and Zettlemoyer", 2022, "The case for 4-bit precision", "2212.09720"),
    options=options,
)
