"""EpiCache: a conversation's topics each get a compressed cache, and a question takes the one of its topic."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.episode_attention import EpisodeAttention
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import CacheBudget, Options, selection, usual_selections

BLOCK_TOKENS = 32
LEAST_SHARE = 0.5
"""Of an even share, for layers that lose next to nothing when they evict: all of it given to others, they would lose more than was measured."""


def whole_cache(budget: CacheBudget) -> Options:
    """Layers share the budget by what the answers lose when that layer alone evicts. Differs from the source, which measures how far a layer's keys
    turn away from those of a whole cache, where the first layer's never do."""
    assert budget.statistics is not None
    errors = budget.statistics.eviction_damage
    even = max(sum(errors) / len(errors), 1e-12)
    shares = [LEAST_SHARE + (1 - LEAST_SHARE) * error / even for error in errors]
    return budget.shared(lambda n: KVOption(selection(EpisodeAttention, n, block_tokens=BLOCK_TOKENS)), shares)


RECIPE = Recipe(
    id="epicache",
    resident="kv",
    title="one cache per topic of a long text, chosen by the question; layers share by the damage of eviction",
    source=Source(
        "Kim, Kundu, Kim, Dixit and Cho",
        2025,
        "EpiCache: Episodic KV Cache Management for Long Conversational Question Answering",
        "2509.17396",
    ),
    options=lambda: usual_selections(EpisodeAttention),
    candidates=False,
    whole_cache=whole_cache,
    needs_statistics=True,
    published="up to 40% better accuracy than other evictions; near the full cache at 4 to 6 times less (abstract)",
)
