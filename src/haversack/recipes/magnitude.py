"""Magnitude pruning: the smallest weights of each row go, whatever their inputs."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.nearest import NearestRounding
from haversack.parts.weights.sparse import SparseGrid
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    patterns = ((0.5, 4), (0.5, 0), (0.7, 0))
    return tuple(WeightOption(SparseGrid(*pattern, weighted=False), NearestRounding()) for pattern in patterns)


RECIPE = Recipe(
    id="magnitude",
    resident="weights",
    title="the smallest weights of each row dropped, the others in 16 bits",
    source=Source(
        "Han, Pool, Tran, Dally",
        2015,
        "Learning both Weights and Connections for Efficient Neural Networks",
        "1506.02626",
    ),
    options=options,
    candidates=False,
)
