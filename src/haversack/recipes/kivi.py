"""KIVI: keys quantized per channel, values per token, a recent window as is."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.quantized import QuantizedKV
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import CacheBudget, Options


def options() -> tuple[KVOption, ...]:
    return tuple(
        KVOption(represent=QuantizedKV(key_bits, value_bits, group_size=64, recent_tokens=64))
        for key_bits, value_bits in ((2, 2), (4, 2), (4, 4), (8, 8))
    )


def whole_cache(budget: CacheBudget) -> Options:
    """The most bytes that fit, over bits, group sizes and recent windows."""
    settings = [
        KVOption(represent=QuantizedKV(key_bits, value_bits, group_size, recent_tokens))
        for key_bits, value_bits in ((2, 2), (4, 2), (4, 4), (8, 4), (8, 8))
        for group_size in (32, 64)
        for recent_tokens in (0, 32, 64)
    ]
    return budget.best_of([(option,) * len(budget.sites) for option in settings])


RECIPE = Recipe(
    id="kivi",
    resident="kv",
    title="keys per channel and values per token at low precision, the recent window as is",
    source=Source(
        "Liu, Yuan, Jin, Zhong, Xu, Braverman, Chen and Hu",
        2024,
        "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
        "2402.02750",
    ),
    options=options,
    whole_cache=whole_cache,
    published="2.6 times less peak memory, model weights included, at almost the same quality (abstract)",
    catalogue=("kivi",),
)
