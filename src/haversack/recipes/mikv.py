"""MiKV: what would be evicted stays, in few bits."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.heavy_hitters import HeavyHitters
from haversack.parts.kv.low_precision import LowPrecision
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import CacheBudget, Options, selection


def options() -> tuple[KVOption, ...]:
    score = HeavyHitters(sink_tokens=4, selected_tokens=60, recent_tokens=64, block_tokens=64)
    return tuple(KVOption(score=score, demote=LowPrecision(bits)) for bits in (2, 4))


def whole_cache(budget: CacheBudget) -> Options:
    """Chosen tokens as they are, as many as fit beside the others at 2 bits."""

    def held(num_tokens: int) -> KVOption:
        return KVOption(score=selection(HeavyHitters, num_tokens, block_tokens=32), demote=LowPrecision(2))

    return budget.everywhere(held)


RECIPE = Recipe(
    id="mikv",
    resident="kv",
    title="heads keep the tokens with the most attention as they are, and the others in few bits",
    source=Source(
        "Yang, Kim, Bae, Kwon, Park, Yang, Kwon and Lee",
        2024,
        "No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization",
        "2402.18096",
    ),
    options=options,
    whole_cache=whole_cache,
    published="up to 80% compression with less loss than eviction or uniform low precision (section 4)",
    catalogue=("mikv",),
)
