"""Mesa: exact forward passes, activations kept in 8 bits."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.recipes.base import Recipe, Setting

RECIPE = Recipe(
    id="mesa",
    resident="activations",
    title="activations kept for the backward pass in 8 bits, with --with saved=8bit",
    source=Source(
        "Pan, Chen, He, Liu, Cai and Zhuang",
        2021,
        "Mesa: A Memory-saving Training Framework for Transformers",
        "2111.11124",
    ),
    options=lambda: (Setting("saved", "8bit"),),
    published="up to half of the memory of training saved (abstract)",
    catalogue=("mesa",),
)
