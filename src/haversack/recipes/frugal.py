"""FRUGAL: AdamW's moments of a random quarter of each matrix's rows, signs of the rest."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.optimizer.adamw import AdamW
from haversack.parts.optimizer.base import OptimizerOption
from haversack.parts.optimizer.random_rows import RandomRows
from haversack.parts.optimizer.signed_residual import SignedResidual
from haversack.recipes.base import Recipe


def options() -> tuple[OptimizerOption, ...]:
    return (OptimizerOption(AdamW(), RandomRows(), residual=SignedResidual()),)


RECIPE = Recipe(
    id="frugal",
    resident="optimizer",
    title="AdamW on a random quarter of the rows, signs elsewhere",
    source=Source(
        "Zmushko, Beznosikov, Takac and Horvath",
        2024,
        "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
        "2411.07837",
    ),
    options=options,
    published="better than GaLore and BAdam in pre-training at the same state budget (abstract)",
    catalogue=("frugal",),
)
