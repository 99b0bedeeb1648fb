"""LOGO: preferences per token without a reference model."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.loss.length_margin import LengthMargin
from haversack.recipes.base import Recipe


def options() -> tuple[LengthMargin, ...]:
    return (LengthMargin(),)


RECIPE = Recipe(
    id="logo",
    resident="loss",
    title="chosen answers above rejected ones per token, and likely; nothing is held of a reference",
    source=Source(
        "Tang, Sun, Li, Zhu and Zhang",
        2024,
        "LOGO: Long cOntext aliGnment via efficient preference Optimization",
        "2410.18533",
    ),
    options=options,
    published="Llama 3 8B with a context of 80k tuned on 0.3B tokens by one machine of eight A800 in 16 hours (abstract)",
)
