"""BitStack: residual blocks of signs times low rank, of which any number may be held."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.dropped import DroppedGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.parts.weights.sign_stack import SignStack
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(
        WeightOption(DroppedGrid(), NearestRounding(), corrections=(SignStack(blocks, 4),)) for blocks in (2, 3, 4, 6)
    )


RECIPE = Recipe(
    id="bitstack",
    resident="weights",
    title="a stack of signs times low rank, the first blocks of which are the smaller model",
    source=Source(
        "Wang, Wang, Wang, Zhang, Zhou, Qiu",
        2024,
        "BitStack: Fine-Grained Size Control for Compressed Large Language Models in Variable Memory Environments",
        "2410.23918",
    ),
    options=options,
    candidates=False,
)
