"""4-bit states: AdamW whose moments are 4-bit codes, the second without a zero."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.optimizer.adamw import AdamW
from haversack.parts.optimizer.base import OptimizerOption
from haversack.parts.optimizer.block_state import BlockState
from haversack.recipes.base import Recipe


def options() -> tuple[OptimizerOption, ...]:
    return (OptimizerOption(AdamW(), state=BlockState(4, 128)),)


RECIPE = Recipe(
    id="adamw4bit",
    resident="optimizer",
    title="AdamW with 4-bit states",
    source=Source("Li, Chen and Zhu", 2023, "Memory Efficient Optimizers with 4-bit States", "2309.01507"),
    options=options,
    published="4-bit states comparable to 32-bit ones on fine-tuning and machine translation (abstract)",
)
