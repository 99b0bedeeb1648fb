"""KVQuant: keys before rotation, calibrated tables, outliers of each vector apart, the first token whole."""

from __future__ import annotations

from dataclasses import replace

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.non_uniform import NonUniformKV
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import CacheBudget, Options

SETTINGS = tuple(
    NonUniformKV(bits, group_size, recent_tokens, num_outliers)
    for bits in (2, 3, 4)
    for group_size in (64, 32)
    for recent_tokens in (0, 64)
    for num_outliers in (0, 1, 2)
)


def whole_cache(budget: CacheBudget) -> Options:
    """The most bytes that fit, over bits, group sizes, recent windows and outliers; then each layer's own tables."""
    assert budget.statistics is not None
    found = budget.best_of([(KVOption(represent=part),) * len(budget.sites) for part in SETTINGS])[0]
    assert isinstance(found.represent, NonUniformKV)
    tables = budget.statistics.tables(found.represent)
    return tuple(
        KVOption(represent=replace(found.represent, key_table=of_keys, value_table=of_values))
        for of_keys, of_values in tables
    )


RECIPE = Recipe(
    id="kvquant",
    resident="kv",
    title="keys before rotation and values by tables of least weighted error, outliers apart, the first token whole",
    source=Source(
        "Hooper, Kim, Mohammadzadeh, Mahoney, Shao, Keutzer and Gholami",
        2024,
        "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization",
        "2401.18079",
    ),
    options=lambda: (),
    whole_cache=whole_cache,
    needs_statistics=True,
    published="less than 0.1 of perplexity lost at 3 bits, on Wikitext-2 and C4, for LLaMA, Llama 2 and 3 and Mistral (abstract)",
)
