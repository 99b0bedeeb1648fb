"""8-bit optimizers: AdamW whose moments are dynamic codes under one scale per block."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.optimizer.adamw import AdamW
from haversack.parts.optimizer.base import OptimizerOption
from haversack.parts.optimizer.block_state import BlockState
from haversack.recipes.base import Recipe


def options() -> tuple[OptimizerOption, ...]:
    return (OptimizerOption(AdamW(), state=BlockState(8, 256)),)


RECIPE = Recipe(
    id="adamw8bit",
    resident="optimizer",
    title="AdamW with 8-bit states",
    source=Source(
        "Dettmers, Lewis, Shleifer and Zettlemoyer", 2021, "8-bit Optimizers via Block-wise Quantization", "2110.02861"
    ),
    options=options,
    published="8-bit states as good as 32-bit ones up to 1.5B parameters, with unchanged hyper-parameters (abstract)",
    catalogue=("8-bit-optimizers",),
)
