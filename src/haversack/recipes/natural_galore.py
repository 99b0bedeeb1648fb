"""Natural GaLore: GaLore whose reduced gradients are divided by the Fisher matrix of the last ones."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.optimizer.base import OptimizerOption
from haversack.parts.optimizer.natural_adamw import NaturalAdamW
from haversack.parts.optimizer.singular_vectors import SingularVectors
from haversack.recipes.base import Recipe

RECIPE = Recipe(
    id="natural-galore",
    resident="optimizer",
    title="GaLore with natural gradients inside the subspace",
    source=Source(
        "Das",
        2024,
        "Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and Fine-tuning",
        "2410.16029",
    ),
    options=lambda: (OptimizerOption(NaturalAdamW(), SingularVectors()),),
    published="83.09% on TinyAgent, 16-bit LoRA 80.06%, with 30% less memory (abstract)",
    catalogue=("natural-galore",),
)
