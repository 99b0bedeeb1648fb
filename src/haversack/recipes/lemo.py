"""LeMo: long contexts tuned with fewer tokens layer by layer."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.recipes.base import Recipe, Setting

RECIPE = Recipe(
    id="lemo",
    resident="activations",
    title="three quarters of the tokens run by inner layers while tuning, with --with saved=tokens",
    source=Source(
        "Wang, Chen, Li, Cao, Ren and Zhang",
        2025,
        "LeMo: Enabling LEss Token Involvement for MOre Context Fine-tuning",
        "2501.09767",
    ),
    options=lambda: (Setting("saved", "tokens"),),
    published="up to 1.93 times less memory and 1.36 times faster (abstract)",
    catalogue=("lemo",),
)
