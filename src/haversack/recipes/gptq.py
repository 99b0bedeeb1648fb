"""GPTQ: second-order error feedback while rounding."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.parts.weights.integer import IntegerGrid
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(
        WeightOption(
            grid=IntegerGrid(bits=bits, group_size=group_size, symmetric=symmetric), rounding=HessianFeedback()
        )
        for bits in (2, 3, 4, 8)
        for group_size in (128, 64)
        for symmetric in (True, False)
    )


RECIPE = Recipe(
    id="gptq",
    resident="weights",
    title="codes chosen column by column, each error fed into the columns not yet rounded",
    source=Source(
        "Frantar, Ashkboos, Hoefler and Alistarh",
        2022,
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        "2210.17323",
    ),
    options=options,
    published="OPT-175B at 4 bits: 8.37 perplexity on WikiText2 against 8.34 at 16 bits (Table 4 of the paper)",
    catalogue=("gptq",),
)
