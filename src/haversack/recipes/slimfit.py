"""SlimFit: layers rest that hardly move, and what cannot be left out is rounded."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.recipes.base import Recipe, Setting

RECIPE = Recipe(
    id="slimfit",
    resident="activations",
    title="half of the layers at rest in each step, all activations in 8 bits, with --with saved=resting",
    source=Source(
        "Ardakani, Haan, Tan, Popovici, Cheung, Iancu and Sen",
        2023,
        "SlimFit: Memory-Efficient Fine-Tuning of Transformer-based Models Using Training Dynamics",
        "2305.18513",
    ),
    options=lambda: (Setting("saved", "resting"),),
    published="2.2 times less memory on average at 0.2% of accuracy, up to 3.1 times at 0.4% (abstract)",
    catalogue=("slimfit",),
)
