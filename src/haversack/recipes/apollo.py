"""APOLLO: gradients scaled by column as AdamW would scale a random projection to a quarter."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.optimizer.adamw import AdamW
from haversack.parts.optimizer.base import OptimizerOption
from haversack.parts.optimizer.random_projection import RandomProjection
from haversack.parts.optimizer.scaled_gradient import ScaledGradient
from haversack.recipes.base import Recipe


def options() -> tuple[OptimizerOption, ...]:
    return (OptimizerOption(AdamW(), RandomProjection(), residual=ScaledGradient()),)


RECIPE = Recipe(
    id="apollo",
    resident="optimizer",
    title="the gradient scaled by column, as AdamW scales a random quarter",
    source=Source(
        "Zhu, Zhang, Cong, Liu, Park, Chandra, Long, Pan, Wang and Lee",
        2024,
        "APOLLO: SGD-like Memory, AdamW-level Performance",
        "2412.05270",
    ),
    options=options,
    published="3 times the throughput of AdamW on 8 A100 at 4 times the batch (abstract)",
    catalogue=("apollo",),
)
