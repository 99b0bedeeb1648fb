"""Bytes in superblocks: integers of 8 bits in small groups whose scales are 4-bit integers, and a normal table of 256 values."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    grids = (CodebookGrid("max8", 0), CodebookGrid("int8", 32, "u4"), CodebookGrid("int8", 16, "u4"))
    return tuple(WeightOption(grid, HessianFeedback()) for grid in grids)


RECIPE = Recipe(
    id="byte-superblocks",
    resident="weights",
    title="8-bit integers in groups of 16 and 32 with 4-bit scales, and Max's 256 normal values by row",
    source=Source("Kawrakow", 2023, "k-quants (llama.cpp, pull request 1684)"),
    options=options,
    candidates=False,  # until kernels read tables of 256 values: decoding tiles costs many times the time
)
