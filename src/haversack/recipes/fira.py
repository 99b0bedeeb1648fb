"""Fira: GaLore's moments, and the gradient outside their span scaled by norms."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.optimizer.adamw import AdamW
from haversack.parts.optimizer.base import OptimizerOption
from haversack.parts.optimizer.norm_scaled_residual import NormScaledResidual
from haversack.parts.optimizer.singular_vectors import SingularVectors
from haversack.recipes.base import Recipe


def options() -> tuple[OptimizerOption, ...]:
    return (OptimizerOption(AdamW(), SingularVectors(), residual=NormScaledResidual()),)


RECIPE = Recipe(
    id="fira",
    resident="optimizer",
    title="GaLore, with the rest of the gradient scaled by norms",
    source=Source(
        "Chen, Feng, Li, Lai, Yue, Yuan and Wang",
        2024,
        "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
        "2410.01623",
    ),
    options=options,
    published="better than LoRA and GaLore, and than full-rank training in some settings, at GaLore's memory (section 5)",
    catalogue=("fira",),
)
