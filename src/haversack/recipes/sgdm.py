"""SGD with momentum: one moment of every weight."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.optimizer.base import OptimizerOption
from haversack.parts.optimizer.sgd_momentum import SGDMomentum
from haversack.recipes.base import Recipe


def options() -> tuple[OptimizerOption, ...]:
    return (OptimizerOption(SGDMomentum()),)


RECIPE = Recipe(
    id="sgdm",
    resident="optimizer",
    title="SGD with momentum",
    source=Source("Polyak", 1964, "Some methods of speeding up the convergence of iteration methods"),
    options=options,
)
