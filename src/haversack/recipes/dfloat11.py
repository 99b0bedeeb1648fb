"""DFloat11: bfloat16 weights with Huffman-coded exponents, bit for bit."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.entropy_coded import EntropyCodedFloat
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    """Room for exponents in eighths of a bit: a matrix takes the least that holds it."""
    return tuple(WeightOption(code=EntropyCodedFloat(eighths / 8)) for eighths in (20, 21, 22, 23, 24, 26, 28, 32))


RECIPE = Recipe(
    id="dfloat11",
    resident="weights",
    title="bfloat16 with Huffman-coded exponents: about two thirds of the bytes, every bit kept",
    source=Source(
        "Zhang, Hariri, Zhong, Chaudhary, Sui, Hu and Shrivastava",
        2025,
        "70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via Dynamic-Length Float",
        "2504.11651",
    ),
    options=options,
    published="about 70% of the bytes of bfloat16 models, outputs bit for bit identical (abstract)",
    catalogue=("dfloat11",),
)
