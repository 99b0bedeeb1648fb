"""DPO: preferences learned directly, without a model of rewards."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.loss.reference_margin import ReferenceMargin
from haversack.recipes.base import Recipe


def options() -> tuple[ReferenceMargin, ...]:
    return (ReferenceMargin(),)


RECIPE = Recipe(
    id="dpo",
    resident="loss",
    title="chosen answers above rejected ones, over the model as it was; the reference's figures made once",
    source=Source(
        "Rafailov, Sharma, Mitchell, Ermon, Manning and Finn",
        2023,
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "2305.18290",
    ),
    options=options,
)
