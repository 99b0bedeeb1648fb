"""Adafactor: second moments by rows and columns."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.optimizer.adafactor import Adafactor
from haversack.parts.optimizer.base import OptimizerOption
from haversack.recipes.base import Recipe


def options() -> tuple[OptimizerOption, ...]:
    return (OptimizerOption(Adafactor()),)


RECIPE = Recipe(
    id="adafactor",
    resident="optimizer",
    title="Adafactor",
    source=Source(
        "Shazeer and Stern", 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", "1804.04235"
    ),
    options=options,
)
