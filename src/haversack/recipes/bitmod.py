"""BitMoD: each group of weights takes the best of four datatypes of its bits."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.parts.weights.nearest import NearestRounding
from haversack.parts.weights.typed import TypedGrid
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(
        WeightOption(TypedGrid(bits), rounding)
        for bits in (3, 4)
        for rounding in (NearestRounding(), HessianFeedback())
    )


RECIPE = Recipe(
    id="bitmod",
    resident="weights",
    title="the best of four floats with a special value for each group of 128",
    source=Source(
        "Chen, AbouElhamayed, Dai, Wang, Andronic, Constantinides, Abdelfattah",
        2024,
        "BitMoD: Bit-serial Mixture-of-Datatype LLM Acceleration",
        "2411.11745",
    ),
    options=options,
    published="4-bit weights with less than 0.5% of accuracy lost on average (abstract)",
    candidates=False,
)
