"""COAT: AdamW whose moments are 8-bit floats with stretched exponents."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.optimizer.adamw import AdamW
from haversack.parts.optimizer.base import OptimizerOption
from haversack.parts.optimizer.expanded_float8 import ExpandedFloat8
from haversack.recipes.base import Recipe

RECIPE = Recipe(
    id="coat",
    resident="optimizer",
    title="AdamW with moments as 8-bit floats of stretched range; activations likewise with saved=fp8",
    source=Source(
        "Xi, Cai, Zhu, Lu, Keutzer, Chen and Han",
        2024,
        "COAT: Compressing Optimizer states and Activation for Memory-Efficient FP8 Training",
        "2410.19313",
    ),
    options=lambda: (OptimizerOption(AdamW(), state=ExpandedFloat8()),),
    published="1.54 times less memory end to end than bfloat16 training, nearly lossless (abstract)",
    catalogue=("coat",),
)
