"""H2O: heavy hitters and recent tokens."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.heavy_hitters import HeavyHitters
from haversack.recipes.base import Recipe


def options() -> tuple[KVOption, ...]:
    return tuple(
        KVOption(score=HeavyHitters(sink_tokens=4, selected_tokens=tokens, recent_tokens=64, block_tokens=64))
        for tokens in (124, 380)
    )


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
    options=options,
    published="with 20% heavy hitters, up to 29 times the throughput of leading systems (abstract)",
    catalogue=("h2o",),
)
