"""LUT-GEMM: sums of binary matrices, each with its own scale per group."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.nearest import NearestRounding
from haversack.parts.weights.sign_planes import SignPlanes
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(
        WeightOption(grid=SignPlanes(bits, 128, bases=True), rounding=NearestRounding()) for bits in (1, 2, 3, 4)
    )


RECIPE = Recipe(
    id="lut-gemm",
    resident="weights",
    title="sums of sign matrices with a scale each per group, products by table lookup",
    source=Source(
        "Park, Park, Kim, Lee, Kim, Kwon, Kwon, Kim, Lee and Lee",
        2022,
        "LUT-GEMM: Quantized Matrix Multiplication based on LUTs for Efficient Inference in Large-Scale Generative Language "
        "Models",
        "2206.09557",
    ),
    options=options,
    # They leave 0.113, 0.034 and 0.0094 of normal weights' variance at 2.25, 3.38 and 4.5 bits, Max's tables 0.111, 0.029 and 0.0069 at
    # 2.25, 3.25 and 4.25.
    candidates=False,
)
