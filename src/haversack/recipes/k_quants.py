"""K-quants: small groups of integers, their scales small integers too, under one 16-bit scale per 256 columns."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(
        WeightOption(grid=CodebookGrid(values, group_size, scales), rounding=NearestRounding())
        for values, group_size, scales in (
            ("int2", 32, "s6"),
            ("int2", 16, "s6"),
            ("int3", 16, "s6"),
            ("int4", 32, "s6"),
        )
    )


RECIPE = Recipe(
    id="k-quants",
    resident="weights",
    title="integers in groups of 16 and 32, 6-bit scales under one 16-bit scale per 256",
    source=Source("Kawrakow", 2023, "k-quants (llama.cpp, pull request 1684)"),
    options=options,
    published="LLaMA 7B, WikiText perplexity of Q4_K_S: 6.0215 (llama.cpp, pull request 3093, of the first version)",
    candidates=False,
)
