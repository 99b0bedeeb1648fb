"""OmniQuant: clipping that is learned by gradient, and nearest codes."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.learned_clipping import LearnedClipping
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(WeightOption(IntegerGrid(bits, 128, symmetric=False), LearnedClipping()) for bits in (2, 3, 4))


RECIPE = Recipe(
    id="omniquant",
    resident="weights",
    title="clipping learned from each matrix's output error, nearest codes on an integer grid",
    source=Source(
        "Shao, Chen, Zhang, Xu, Zhao, Li, Zhang, Gao, Qiao and Luo",
        2023,
        "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models",
        "2308.13137",
    ),
    options=options,
    candidates=False,
)
