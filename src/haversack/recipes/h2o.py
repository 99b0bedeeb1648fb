"""H2O: heavy hitters and recent tokens."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.heavy_hitters import HeavyHitters
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import selection, usual_selections

RECIPE = Recipe(
    id="h2o",
    resident="kv",
    title="each head keeps recent tokens and those with the most attention so far",
    source=Source(
        "Zhang, Sheng, Zhou, Chen, Zheng, Cai, Song, Tian, Re, Barrett, Wang and Chen",
        2023,
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        "2306.14048",
    ),
    options=lambda: usual_selections(HeavyHitters),
    whole_cache=lambda budget: budget.everywhere(lambda n: KVOption(selection(HeavyHitters, n))),
    published="with 20% heavy hitters, up to 29 times the throughput of leading systems (abstract)",
    catalogue=("h2o",),
)
