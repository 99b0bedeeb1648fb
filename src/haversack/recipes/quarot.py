"""QuaRot's rotation before GPTQ: outliers spread over all inputs, then integers with second-order feedback."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.hadamard import HadamardRotation
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.parts.weights.integer import IntegerGrid
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(
        WeightOption(
            transforms=(HadamardRotation(),), grid=IntegerGrid(bits=bits, group_size=128), rounding=HessianFeedback()
        )
        for bits in (2, 3, 4)
    )


RECIPE = Recipe(
    id="quarot",
    resident="weights",
    title="random Hadamard rotation of each matrix's inputs, then GPTQ",
    source=Source(
        "Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler and Hensman",
        2024,
        "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
        "2404.00456",
    ),
    options=options,
    candidates=False,
)
