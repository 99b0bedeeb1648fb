"""ZeroQuant: integers per group, times activations rounded to 8 bits while the model runs."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    """Differs from the paper in that a token's activations have a scale per group of columns, as the weights have."""
    return tuple(
        WeightOption(grid=IntegerGrid(bits, 128, activation_bits=8), rounding=NearestRounding()) for bits in (4, 8)
    )


RECIPE = Recipe(
    id="zeroquant",
    resident="weights",
    title="integers per group, activations in 8 bits per token and group, multiplied as integers",
    source=Source(
        "Yao, Yazdani Aminabadi, Zhang, Wu, Li and He",
        2022,
        "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
        "2206.01861",
    ),
    options=options,
    # Proxies see the error of weights alone, so that it would seem to cost nothing; whole plans measure what it loses.
    candidates=False,
)
