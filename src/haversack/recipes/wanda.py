"""Wanda: weights are kept by magnitude times the size of their inputs."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.nearest import NearestRounding
from haversack.parts.weights.sparse import SparseGrid
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(
        WeightOption(SparseGrid(*pattern), NearestRounding()) for pattern in ((0.5, 4), (0.5, 8), (0.5, 0), (0.7, 0))
    )


RECIPE = Recipe(
    id="wanda",
    resident="weights",
    title="of each row, or each 4 or 8 columns, the weights of the largest magnitude times input kept in 16 bits",
    source=Source(
        "Sun, Liu, Bair, Kolter",
        2023,
        "A Simple and Effective Pruning Approach for Large Language Models",
        "2306.11695",
    ),
    options=options,
    published="LLaMA-7B at half its weights: WikiText perplexity 7.26, where magnitude pruning gives 17.29 and none 5.68",
    candidates=False,
)
