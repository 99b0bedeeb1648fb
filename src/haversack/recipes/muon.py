"""Muon: one moment of every matrix inside the layers, AdamW's two of the rest."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.optimizer.base import OptimizerOption
from haversack.parts.optimizer.muon import Muon
from haversack.recipes.base import Recipe


def options() -> tuple[OptimizerOption, ...]:
    return (OptimizerOption(Muon()),)


RECIPE = Recipe(
    id="muon",
    resident="optimizer",
    title="Muon inside the layers, AdamW elsewhere",
    source=Source("Jordan et al.", 2024, "Muon: An optimizer for hidden layers in neural networks"),
    options=options,
)
