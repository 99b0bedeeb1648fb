"""Outlier-aware block floating point: channels ordered so that large ones share blocks and exponents."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.block_float import BlockFloatKV
from haversack.parts.kv.channels import ChosenChannels, by_falling
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import CacheBudget, Options

SETTINGS = tuple(
    BlockFloatKV(bits, block_size, recent_tokens)
    for bits in (2, 3, 4, 8)
    for block_size in (64, 32, 16)
    for recent_tokens in (0, 32)
)


def whole_cache(budget: CacheBudget) -> Options:
    """The most bytes that fit, over bits, blocks and recent windows; channels of each head by falling energy on calibration text."""
    assert budget.statistics is not None
    orders = [
        ChosenChannels(by_falling(channels.key_energy), by_falling(channels.value_energy))
        for channels in budget.statistics.channels
    ]
    return budget.best_of(
        [tuple(KVOption(represent=part, project=order) for order in orders) for part in SETTINGS],
    )


RECIPE = Recipe(
    id="outlier-aware-bfp",
    resident="kv",
    title="block floating point, channels ordered so that outliers share exponents",
    source=Source(
        "Trukhanov and Soloveychik",
        2024,
        "Accurate Block Quantization in LLMs with Outliers",
        "2403.20137",
    ),
    options=lambda: tuple(KVOption(represent=BlockFloatKV(bits)) for bits in (2, 4, 8)),
    whole_cache=whole_cache,
    needs_statistics=True,
    candidates=False,
    published="half the memory of the KV cache without significant degradation (abstract)",
    catalogue=("outlier-aware-bfp-channel-reordering",),
)
