"""T-MAC: few-bit weights as bit planes whose products are looked up, at a cost linear in bits."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.parts.weights.sign_planes import SignPlanes
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(WeightOption(grid=SignPlanes(bits, 128), rounding=HessianFeedback()) for bits in (1, 2, 3, 4))


RECIPE = Recipe(
    id="t-mac",
    resident="weights",
    title="bit planes whose sums of activations are looked up, rounded with second-order feedback",
    source=Source(
        "Wei, Cao, Cao, Ma, Wang, Zhang and Yang",
        2024,
        "T-MAC: CPU Renaissance via Table Lookup for Low-Bit LLM Deployment on Edge",
        "2407.00088",
    ),
    options=options,
    published="up to 4 times llama.cpp's throughput and 70% less energy; 30 tokens/s of BitNet-b1.58-3B with one core of an M2 "
    "Ultra (abstract)",
    catalogue=("t-mac",),
    # In groups of 64, 2 to 4 bits leave 0.113, 0.033 and 0.0088 of normal weights' variance, Max's tables 0.111, 0.029 and 0.0069.
    candidates=False,
)
