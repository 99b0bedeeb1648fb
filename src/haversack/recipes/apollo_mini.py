"""APOLLO-Mini: gradients scaled by matrix, as AdamW would scale one random direction."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.optimizer.adamw import AdamW
from haversack.parts.optimizer.base import OptimizerOption
from haversack.parts.optimizer.random_projection import RandomProjection
from haversack.parts.optimizer.scaled_gradient import ScaledGradient
from haversack.recipes.base import Recipe


def options() -> tuple[OptimizerOption, ...]:
    return (OptimizerOption(AdamW(), RandomProjection(rank=1), residual=ScaledGradient(whole=True)),)


RECIPE = Recipe(
    id="apollo-mini",
    resident="optimizer",
    title="the gradient scaled as AdamW scales one random direction",
    source=Source(
        "Zhu, Zhang, Cong, Liu, Park, Chandra, Long, Pan, Wang and Lee",
        2024,
        "APOLLO: SGD-like Memory, AdamW-level Performance",
        "2412.05270",
        "section 4.3",
    ),
    options=options,
    published="pre-training of a 7B model in less than 12 GB, with 8-bit weights (abstract)",
    catalogue=("apollo",),
)
