"""RSQ: rotate, scale tokens by the attention they get, then quantize with second-order feedback."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.hadamard import HadamardRotation
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.token_weighting import TokenWeighting
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    transforms = (TokenWeighting(), HadamardRotation())
    return tuple(WeightOption(IntegerGrid(bits, 128), HessianFeedback(), transforms) for bits in (2, 3, 4))


RECIPE = Recipe(
    id="rsq",
    resident="weights",
    title="statistics of tokens weighed by attention, random Hadamard rotation, then GPTQ",
    source=Source(
        "Sung, Yadav, Li, Yoon and Bansal",
        2025,
        "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs",
        "2503.01820",
    ),
    options=options,
    candidates=False,
)
