"""Q-GaLore: GaLore with 4-bit bases that are made anew ever less often, and 8-bit moments."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.optimizer.adamw import AdamW
from haversack.parts.optimizer.base import OptimizerOption
from haversack.parts.optimizer.block_state import BlockState
from haversack.parts.optimizer.lazy_singular_vectors import LazySingularVectors
from haversack.recipes.base import Recipe

RECIPE = Recipe(
    id="q-galore",
    resident="optimizer",
    title="8-bit GaLore on 4-bit bases, refreshed where they still change; weights in 8 bits besides with precision=int8",
    source=Source(
        "Zhang, Jaiswal, Yin, Liu, Zhao, Tian and Wang",
        2024,
        "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients",
        "2407.08296",
    ),
    options=lambda: (OptimizerOption(AdamW(), LazySingularVectors(), BlockState(8, 256)),),
    published="a 7B Llama trained from scratch on one GPU of 16 GB; up to 50% less memory than LoRA and GaLore in tuning (abstract)",
    catalogue=("q-galore",),
)
