"""SmoothQuant+: inputs smoothed into weights, then nearest codes of 4 bits in groups."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.parts.weights.smoothing import SmoothingScale
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    grids = (IntegerGrid(4, 128, symmetric=False), IntegerGrid(4, 64, symmetric=False))
    return tuple(WeightOption(grid, NearestRounding(), (SmoothingScale(),)) for grid in grids)


RECIPE = Recipe(
    id="smoothquant",
    resident="weights",
    title="inputs smoothed into weights, nearest 4-bit codes in groups",
    source=Source(
        "Pan, Wang, Zheng, Li, Wang, Feng",
        2023,
        "SmoothQuant+: Accurate and Efficient 4-bit Post-Training WeightQuantization for LLM",
        "2312.03788",
    ),
    options=options,
    candidates=False,
)
