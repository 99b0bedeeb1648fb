"""PEQA: the scales of a quantized base are tuned, its integers stay."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.recipes.base import Recipe, Setting

RECIPE = Recipe(
    id="peqa",
    resident="adaptation",
    title="scales of a base in 4-bit integers tuned, with --method peqa",
    source=Source(
        "Kim, Lee, Kim, Park, Yoo, Kwon and Lee",
        2023,
        "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer Quantization",
        "2305.14152",
    ),
    options=lambda: (Setting("method", "peqa"),),
    published="language models of up to 65 billion parameters tuned below 4 bits (abstract)",
    catalogue=("peqa",),
)
