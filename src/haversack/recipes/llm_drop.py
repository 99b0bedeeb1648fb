"""LLM-Drop: whole attention or feed-forward blocks go; which of them, the planner says."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.dropped import DroppedGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.recipes.base import Recipe

RECIPE = Recipe(
    id="llm-drop",
    resident="weights",
    title="attention or feed-forward blocks dropped whole",
    source=Source("He, Sun, Shen, Li", 2024, "What Matters in Transformers? Not All Attention is Needed", "2406.15786"),
    options=lambda: (WeightOption(DroppedGrid(), NearestRounding()),),
    published="Llama-2-70B with half of its attention layers dropped: 48.4% faster, 2.4% of its performance lost (abstract)",
    candidates=False,
)
