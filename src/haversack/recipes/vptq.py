"""VPTQ: vectors of a codebook per matrix, chosen with second-order feedback."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.vector import VectorGrid
from haversack.parts.weights.vector_feedback import VectorFeedback
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(
        WeightOption(grid=VectorGrid(length, group_size), rounding=VectorFeedback())
        for length, group_size in ((4, 128), (4, 64), (2, 128))
    )


RECIPE = Recipe(
    id="vptq",
    resident="weights",
    title="a byte names a vector of 4 or 2 weights, from a codebook per matrix, with second-order feedback",
    source=Source(
        "Liu, Wen, Wang, Ye, Zhang, Cao, Li and Yang",
        2024,
        "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models",
        "2409.17066",
    ),
    options=options,
    published="2-bit perplexity lower by 0.01 to 0.34 on LLaMA-2 and 4.41 to 7.34 on LLaMA-3 than the state of the art (abstract)",
    catalogue=("vptq",),
    candidates=False,  # until kernels read this form: decoding tiles costs many times the time
)
