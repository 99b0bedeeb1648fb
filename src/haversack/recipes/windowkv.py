"""WindowKV: stretches of neighbouring tokens are kept together."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.token_windows import TokenWindows
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import selection

RECIPE = Recipe(
    id="windowkv",
    resident="kv",
    title="each head keeps recent tokens and stretches with the most attention from the latest queries",
    source=Source(
        "Zuo et al.",
        2025,
        "WindowKV: Task-Adaptive Group-Wise KV Cache Window Selection for Efficient LLM Inference",
        "2503.17922",
    ),
    options=lambda: (),
    whole_cache=lambda budget: budget.everywhere(lambda n: KVOption(selection(TokenWindows, n))),
    published="performance near the full cache's with 12% of it (abstract)",
)
