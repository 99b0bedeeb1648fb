"""Scissorhands: tokens that were important stay important."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.persistence import Persistence
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import selection, usual_selections

RECIPE = Recipe(
    id="scissorhands",
    resident="kv",
    title="each head keeps recent tokens and those that recent queries kept attending to",
    source=Source(
        "Liu, Desai, Liao, Wang, Xie, Xu, Kyrillidis and Shrivastava",
        2023,
        "Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression at Test Time",
        "2305.17118",
    ),
    options=lambda: usual_selections(Persistence),
    whole_cache=lambda budget: budget.everywhere(lambda n: KVOption(selection(Persistence, n))),
    published="up to 5 times less KV cache, 20 times with 4-bit quantization, without loss of quality (abstract)",
    catalogue=("scissorhands",),
)
