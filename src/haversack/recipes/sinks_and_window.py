"""Attention sinks: the first tokens and a recent window are kept, the rest dropped."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.sinks import SinksAndWindow
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import CacheBudget, Options


def options() -> tuple[KVOption, ...]:
    return tuple(KVOption(score=SinksAndWindow(sink_tokens=4, window_tokens=tokens)) for tokens in (252, 508, 1020))


def whole_cache(budget: CacheBudget) -> Options:
    return budget.everywhere(lambda n: KVOption(score=SinksAndWindow(sink_tokens=4, window_tokens=n)))


RECIPE = Recipe(
    id="sinks-and-window",
    resident="kv",
    title="the first four tokens and a recent window, nothing between",
    source=Source(
        "Xiao, Tian, Chen, Han and Lewis",
        2023,
        "Efficient Streaming Language Models with Attention Sinks",
        "2309.17453",
    ),
    options=options,
    whole_cache=whole_cache,
    published="stable perplexity over 4 million tokens with a constant cache (abstract)",
)
