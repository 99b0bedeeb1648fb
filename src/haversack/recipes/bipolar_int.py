"""Bipolar integers: weights of 1 to 8 bits as planes of signs, multiplied with int8 activations bit by bit, exactly."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.nearest import NearestRounding
from haversack.parts.weights.sign_planes import SignPlanes
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(
        WeightOption(grid=SignPlanes(bits, 128, activation_bits=8), rounding=NearestRounding()) for bits in range(1, 9)
    )


RECIPE = Recipe(
    id="bipolar-int",
    resident="weights",
    title="odd integers of 1 to 8 bits in bit planes, activations in 8, multiplied by counting bits",
    source=Source(
        "Ma, Fang, Shao and Wang",
        2024,
        "Efficient Arbitrary Precision Acceleration for Large Language Models on GPU Tensor Cores",
        "2409.17870",
    ),
    options=options,
    published="matrix products up to 2.4 times as fast as CUTLASS's, whole models up to 6.7 times as fast (abstract)",
    catalogue=("bipolar-int-arbitrary-precision-gemm",),
    # In groups of 64, 2 to 4 bits leave 0.113, 0.033 and 0.0088 of normal weights' variance, Max's tables 0.111, 0.029 and 0.0069.
    candidates=False,
)
