"""AWQ: columns that meet large inputs are scaled up before they are rounded."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.activation_scale import ActivationScale
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(
        WeightOption(
            transforms=(ActivationScale(),), grid=IntegerGrid(bits, 128, symmetric=False), rounding=NearestRounding()
        )
        for bits in (2, 3, 4)
    )


RECIPE = Recipe(
    id="awq",
    resident="weights",
    title="activation-aware scales found by search, nearest codes on an integer grid with clipping search",
    source=Source(
        "Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan and Han",
        2023,
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
        "2306.00978",
    ),
    options=options,
    candidates=False,
)
