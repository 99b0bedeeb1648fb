"""GEAR: few bits, with a low-rank residual and outliers that take off what they lose."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.corrected import CorrectedKV
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import CacheBudget, Options


def whole_cache(budget: CacheBudget) -> Options:
    """The most bytes that fit, over bits, ranks and outliers."""
    settings = [
        KVOption(represent=CorrectedKV(key_bits, value_bits, 64, recent_tokens, rank, outliers))
        for key_bits, value_bits in ((2, 2), (4, 2), (4, 4))
        for recent_tokens in (0, 64)
        for rank, outliers in ((1, 8), (2, 16), (4, 32))
    ]
    return budget.best_of([(option,) * len(budget.sites) for option in settings])


RECIPE = Recipe(
    id="gear",
    resident="kv",
    title="few bits, a low-rank residual and outliers kept apart",
    source=Source(
        "Kang, Zhang, Kundu, Jeong, Liu, Krishna and Zhao",
        2024,
        "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM",
        "2403.05527",
    ),
    options=lambda: (),
    whole_cache=whole_cache,
    published="nearly lossless 4-bit caches, up to 2.38 times the throughput, peak memory up to 2.29 times less (abstract)",
    catalogue=("gear",),
)
