"""SGD-SaI: SGD with momentum, whose learning rates the first gradient fixes."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.optimizer.base import OptimizerOption
from haversack.parts.optimizer.scaled_at_initialization import ScaledAtInitialization
from haversack.recipes.base import Recipe


def options() -> tuple[OptimizerOption, ...]:
    return (OptimizerOption(ScaledAtInitialization()),)


RECIPE = Recipe(
    id="sgd-sai",
    resident="optimizer",
    title="SGD with momentum, scaled at initialisation",
    source=Source(
        "Xu, Xiang, Cai and Wen",
        2024,
        "No More Adam: Learning Rate Scaling at Initialization is All You Need",
        "2412.11768",
    ),
    options=options,
    published="half of AdamW's state, 5.93 GB less on GPT-2 (1.5B) and 25.15 GB on Llama2-7B (abstract)",
    catalogue=("sgd-sai",),
)
