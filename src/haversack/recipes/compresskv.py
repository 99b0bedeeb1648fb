"""CompressKV: a layer's retrieval heads alone choose what all its heads keep; layers share the budget by what eviction costs there."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.voting_heads import VotingHeads
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import CacheBudget, Options, selection

SHARE_OF_HEADS = 0.25
LEAST_SHARE = 0.5
"""Of an even share, for layers that lose next to nothing: all of it given to others, they would lose more than was measured."""


def whole_cache(budget: CacheBudget) -> Options:
    """Voters are the quarter of a layer's query heads that look most at what is asked for. Differs from the source in that a layer's error is the
    answers' divergence when its heads stream, and not the change of its attention's output."""
    assert budget.statistics is not None
    errors = [sum(row) for row in budget.statistics.head_damage]
    even = max(sum(errors) / len(errors), 1e-12)
    shares = [LEAST_SHARE + (1 - LEAST_SHARE) * error / even for error in errors]
    voters = []
    for row in budget.statistics.retrieval:
        count = max(1, int(len(row) * SHARE_OF_HEADS))
        voters.append(tuple(sorted(sorted(range(len(row)), key=lambda head: -row[head])[:count])))

    def at(n: int) -> Options:
        return tuple(
            KVOption(selection(VotingHeads, min(budget.most_tokens, round(n * share)), voters=heads))
            for share, heads in zip(shares, voters, strict=True)
        )

    return budget.largest(at, budget.most_tokens * len(budget.sites))


RECIPE = Recipe(
    id="compresskv",
    resident="kv",
    title="retrieval heads choose the tokens of all heads, layers share by the damage of eviction",
    source=Source(
        "Lin, Wang, Kondrateva, Shi, Li and Zhang",
        2025,
        "CompressKV: Semantic Retrieval Heads Know What Tokens are Not Important Before Generation",
        "2508.02401",
    ),
    options=lambda: (),
    published="over 97% of full-cache performance on LongBench's question answering with 3% of the cache (abstract)",
    whole_cache=whole_cache,
    needs_statistics=True,
    catalogue=("compresskv",),
)
