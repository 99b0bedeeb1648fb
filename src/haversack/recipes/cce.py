"""CCE: cross entropy from blocks of logits that are never held together."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.loss.cut import CutCrossEntropy
from haversack.recipes.base import Recipe


def options() -> tuple[CutCrossEntropy, ...]:
    return (CutCrossEntropy(),)


RECIPE = Recipe(
    id="cce",
    resident="loss",
    title="cross entropy by blocks of logits, made again for the gradients",
    source=Source(
        "Wijmans, Huval, Hertzberg, Koltun and Kraehenbuehl",
        2024,
        "Cut Your Losses in Large-Vocabulary Language Models",
        "2411.09009",
    ),
    options=options,
    published="the loss of Gemma 2 (2B) in 1 MB instead of 24 GB (abstract)",
    catalogue=("cce-cut-cross-entropy",),
)
