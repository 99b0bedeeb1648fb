"""ShadowKV: keys of low rank on the device say which few values a step fetches from another tier."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.far_values import FarValues
from haversack.parts.kv.low_rank import LowRankKV
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import CacheBudget, Options

READ_SHARE, RANKS = 1 / 8, 32


def whole_cache(budget: CacheBudget) -> Options:
    """Every key by as many calibrated directions as fit, an eighth of the values read per step; whole where that fits."""
    assert budget.statistics is not None
    if budget.bytes_of(budget.whole) <= budget.num_bytes:
        return budget.whole
    values = FarValues(max(1, int(READ_SHARE * budget.capacity_tokens)))

    def at(n: int) -> Options:
        ranks = (max(2, site.key_head_dim * n // RANKS) for site in budget.sites)
        return tuple(KVOption(represent=values, project=LowRankKV(rank)) for rank in ranks)

    fitted = zip(budget.statistics.channels, budget.largest(at, RANKS))
    return tuple(
        KVOption(represent=values, project=channels.fitted(option.project))
        for channels, option in fitted
        if isinstance(option.project, LowRankKV)
    )


RECIPE = Recipe(
    id="shadowkv",
    resident="kv",
    title="keys of low rank on the device choose the few values that a step fetches from another tier",
    source=Source(
        "Sun, Chang, Bao, Zheng, Zheng, Liu, Dong, Chi and Chen",
        2024,
        "ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference",
        "2410.21465",
    ),
    options=lambda: (KVOption(represent=FarValues()),),
    whole_cache=whole_cache,
    needs_statistics=True,
    candidates=False,
    published="batches up to 6 times as large and up to 3.04 times the throughput on an A100 (abstract)",
    catalogue=("shadowkv",),
)
