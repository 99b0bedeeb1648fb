"""CompactifAI: matrices as tensor networks cut at a bond dimension."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.dropped import DroppedGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.parts.weights.tensor_network import TensorNetwork
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    bonds = (64, 128)
    return tuple(WeightOption(DroppedGrid(), NearestRounding(), corrections=(TensorNetwork(bond),)) for bond in bonds)


RECIPE = Recipe(
    id="compactifai",
    resident="weights",
    title="two tensors joined by a bond for each matrix",
    source=Source(
        "Tomut et al.",
        2024,
        "CompactifAI: Extreme Compression of Large Language Models using Quantum-Inspired Tensor Networks",
        "2401.14109",
    ),
    options=options,
    candidates=False,
)
