"""Any precision: models of fewer bits inside one of more, here as blocks for what two bits left over."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.parts.weights.residual_planes import ResidualPlanes
from haversack.recipes.base import Recipe

BLOCKS = (1, 2, 3)


def options() -> tuple[WeightOption, ...]:
    base = WeightOption(CodebookGrid("max2", 32, "u4"), HessianFeedback())
    return tuple(WeightOption(base.grid, base.rounding, corrections=(ResidualPlanes(blocks),)) for blocks in BLOCKS)


RECIPE = Recipe(
    id="any-precision",
    resident="weights",
    title="two bits, and blocks of two more for what is left over, of which any number may be held",
    source=Source(
        "Park, Hyun, Cho, Sim, Lee",
        2024,
        "Any-Precision LLM: Low-Cost Deployment of Multiple, Different-Sized LLMs",
        "2402.10517",
    ),
    options=options,
    candidates=False,
)
