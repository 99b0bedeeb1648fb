"""8-bit GaLore: moments in a quarter of the singular vectors, as codes."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.optimizer.adamw import AdamW
from haversack.parts.optimizer.base import OptimizerOption
from haversack.parts.optimizer.block_state import BlockState
from haversack.parts.optimizer.singular_vectors import SingularVectors
from haversack.recipes.base import Recipe


def options() -> tuple[OptimizerOption, ...]:
    return (OptimizerOption(AdamW(), SingularVectors(), BlockState(8, 256)),)


RECIPE = Recipe(
    id="galore8bit",
    resident="optimizer",
    title="GaLore with 8-bit states",
    source=Source(
        "Zhao, Zhang, Chen, Wang, Anandkumar and Tian",
        2024,
        "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
        "2403.03507",
    ),
    options=options,
    published="82.5% less optimizer memory (abstract)",
    catalogue=("galore",),
)
