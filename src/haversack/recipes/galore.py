"""GaLore: AdamW's moments in a quarter of each matrix's singular vectors."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.optimizer.adamw import AdamW
from haversack.parts.optimizer.base import OptimizerOption
from haversack.parts.optimizer.singular_vectors import SingularVectors
from haversack.recipes.base import Recipe


def options() -> tuple[OptimizerOption, ...]:
    return (OptimizerOption(AdamW(), SingularVectors()),)


RECIPE = Recipe(
    id="galore",
    resident="optimizer",
    title="AdamW in the span of the gradient's leading singular vectors",
    source=Source(
        "Zhao, Zhang, Chen, Wang, Anandkumar and Tian",
        2024,
        "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
        "2403.03507",
    ),
    options=options,
    published="65.5% less optimizer memory at the same quality; with 8 bits 82.5% (abstract)",
    catalogue=("galore",),
)
