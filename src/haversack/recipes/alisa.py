"""ALISA: half the room for recent tokens, half for those that the latest queries attended to."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.latest_attention import LatestAttention
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import selection

RECIPE = Recipe(
    id="alisa",
    resident="kv",
    title="each head keeps recent tokens and those with the most attention from the latest queries",
    source=Source(
        "Zhao, Wu and Wang",
        2024,
        "ALISA: Accelerating Large Language Model Inference via Sparsity-Aware KV Caching",
        "2403.17312",
    ),
    options=lambda: (),
    whole_cache=lambda budget: budget.everywhere(lambda n: KVOption(selection(LatestAttention, n))),
    published="up to 3 times FlexGen's and 1.9 times vLLM's throughput, with offloading and recomputation scheduled (abstract)",
)
