"""CAKE: layers whose attention is spread wide, and moves, get more of the cache."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.normalized_attention import NormalizedAttention
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import CacheBudget, Options, selection

DISPERSION_TEMPERATURE = SHIFT_TEMPERATURE = 1.0
"""The paper tunes both per model; 1 leaves the product as it is."""


def whole_cache(budget: CacheBudget) -> Options:
    """Tokens in proportion to dispersion^(1/t1) * shift^(1/t2). Differs from the source in that layers' shares are measured beforehand
    and not per prompt, so that no layer ever holds more than its own, and in that tokens are chosen by attention per query that saw them."""
    assert budget.statistics is not None
    shares = [
        dispersion ** (1 / DISPERSION_TEMPERATURE) * shift ** (1 / SHIFT_TEMPERATURE)
        for dispersion, shift in zip(budget.statistics.dispersion, budget.statistics.shift)
    ]
    return budget.shared(lambda n: KVOption(selection(NormalizedAttention, n)), shares)


RECIPE = Recipe(
    id="cake",
    resident="kv",
    title="layers share the budget by how far their attention spreads and how much it moves",
    source=Source(
        "Qin, Cao, Lin, Hu, Fan, Cheng, Lin and Li",
        2025,
        "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences",
        "2503.12491",
    ),
    options=lambda: (),
    whole_cache=whole_cache,
    needs_statistics=True,
    published="performance kept with 3.2% of the cache; decoding over 10 times as fast at 128K tokens (abstract)",
    catalogue=("cake",),
)
