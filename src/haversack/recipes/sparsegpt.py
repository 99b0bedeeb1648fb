"""SparseGPT: weights are dropped with second-order feedback, and those that stay make up for them."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.sparse import SparseGrid
from haversack.parts.weights.sparse_feedback import SparseFeedback
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    kinds = ((0.5, 0, "max3"), (0.5, 0, "max4"), (0.5, 4, "f16"), (0.5, 0, "f16"), (0.7, 0, "f16"))
    return tuple(WeightOption(SparseGrid(*kind), SparseFeedback()) for kind in kinds)


RECIPE = Recipe(
    id="sparsegpt",
    resident="weights",
    title="half of the weights dropped with second-order feedback, the others in 16 bits or as codes",
    source=Source(
        "Frantar, Alistarh",
        2023,
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        "2301.00774",
    ),
    options=options,
    published="OPT-175B and BLOOM-176B: 60% of the weights dropped with a negligible increase in perplexity (abstract)",
    candidates=False,
)
