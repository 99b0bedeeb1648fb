"""INT2.1: a low-rank correction of what 2 bits leave over."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.low_rank import LowRankCorrection
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(
        WeightOption(grid=IntegerGrid(2, 64), rounding=HessianFeedback(), corrections=(LowRankCorrection(rank),))
        for rank in (1, 4)
    )


RECIPE = Recipe(
    id="int2-1-emef-lrec",
    resident="weights",
    title="2-bit integers with second-order feedback, and the error's leading directions at low rank",
    source=Source(
        "Chai, Gkountouras, Ko, Brooks and Wei",
        2023,
        "INT2.1: Towards Fine-Tunable Quantized Large Language Models with Error Correction through Low-Rank Adaptation",
        "2306.08162",
    ),
    options=options,
    candidates=False,
)
