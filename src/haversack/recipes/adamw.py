"""AdamW: two moments of every weight, in its own dtype."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.optimizer.adamw import AdamW
from haversack.parts.optimizer.base import OptimizerOption
from haversack.recipes.base import Recipe


def options() -> tuple[OptimizerOption, ...]:
    return (OptimizerOption(AdamW()),)


RECIPE = Recipe(
    id="adamw",
    resident="optimizer",
    title="AdamW, states in the weights' dtype",
    source=Source("Loshchilov and Hutter", 2017, "Decoupled Weight Decay Regularization", "1711.05101"),
    options=options,
)
