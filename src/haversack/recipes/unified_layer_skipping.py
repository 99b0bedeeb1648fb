"""Unified layer skipping: as many layers as must go, spread evenly, whatever the input."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.dropped import DroppedGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.recipes.allocation import Allocation, Chosen
from haversack.recipes.base import Recipe


def kept_layers(num_layers: int, num_kept: int) -> frozenset[int]:
    """So many layers, evenly spread from the first to the last; the first alone where one is kept."""
    if num_kept == 1:
        return frozenset({0})
    return frozenset(round(i * (num_layers - 1) / (num_kept - 1)) for i in range(num_kept))


def choose(asked: Allocation) -> Chosen:
    """Everything as it is in as many layers as fit, nothing in the others."""
    layers = sorted({site.layer for site in asked.sites if site.layer is not None})
    for number in range(len(layers), 0, -1):
        kept = {None, *(layers[place] for place in kept_layers(len(layers), number))}
        chosen = tuple(len(site.choices) - 1 if site.layer in kept else 0 for site in asked.sites)
        if asked.fits(chosen):
            return chosen
    return (0,) * len(asked.sites)


RECIPE = Recipe(
    id="unified-layer-skipping",
    resident="weights",
    title="layers left out whole, evenly spread, as many as must go",
    source=Source(
        "Liu, Meng, Zhou",
        2024,
        "Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy",
        "2404.06954",
    ),
    options=lambda: (WeightOption(DroppedGrid(), NearestRounding()),),
    choose=choose,
    candidates=False,
)
