"""LST: a ladder of small layers beside a frozen model, through which no gradient passes."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.recipes.base import Recipe, Setting

RECIPE = Recipe(
    id="lst",
    resident="adaptation",
    title="a side network that reads hidden states, with --method side",
    source=Source(
        "Sung, Cho and Bansal",
        2022,
        "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning",
        "2206.06522",
    ),
    options=lambda: (Setting("method", "side"),),
    published="69% less memory than full tuning, other parameter-efficient methods 26% (abstract)",
    catalogue=("lst",),
)
