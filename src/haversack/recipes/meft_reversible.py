"""MEFT: a pre-trained model made reversible, so that activations are found again instead of kept."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.recipes.base import Recipe, Setting

RECIPE = Recipe(
    id="meft-reversible",
    resident="activations",
    title="layers coupled so that their inputs are found again, with --with saved=reversible",
    source=Source(
        "Liao, Tan and Monz",
        2023,
        "Make Pre-trained Model Reversible: From Parameter to Memory Efficient Fine-Tuning",
        "2306.00477",
    ),
    options=lambda: (Setting("saved", "reversible"),),
    published="up to 84% less memory for activations than full tuning (abstract)",
    catalogue=("meft-reversible",),
)
