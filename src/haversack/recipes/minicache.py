"""MiniCache: pairs of layers in the deeper half share the directions of their keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.depth_merged import DepthMergedKV
from haversack.parts.kv.low_rank import LowRankKV
from haversack.parts.kv.quantized import QuantizedKV
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import CacheBudget, Options

DEEPER_SHARE = 0.25
"""Of the angle, as far as directions go towards the deeper layer: the first layer's errors pass through more of the model. With the last two layers merged a quarter costs 1.7% of B's
perplexity and 2.3% of A's, half the way 5.2% and 8.8% (foreign prose)."""


def paired(turns: Sequence[LowRankKV], num_pairs: int, bits: int, group_size: int, recent_tokens: int) -> Options:
    """The deepest layers in pairs, of which the deeper one is turned to the other; everything in the model's dtype (bits 0), or at `bits`."""
    alone = KVOption() if not bits else KVOption(represent=QuantizedKV(bits, bits, group_size, recent_tokens))
    merged = DepthMergedKV(False, bits, group_size, recent_tokens, deeper_share=DEEPER_SHARE)
    first, deeper = (KVOption(represent=replace(merged, is_deeper=is_deeper)) for is_deeper in (False, True))
    start = len(turns) - 2 * num_pairs
    pairs = [replace(deeper, project=turns[i]) if (i - start) % 2 else first for i in range(start, len(turns))]
    return (alone,) * start + tuple(pairs)


def whole_cache(budget: CacheBudget) -> Options:
    """The most bytes that fit, over pairs in the deeper half, bits, groups and recent windows.

    Differs from the source in that a layer is turned to its partner before the two are merged: those of small models share no directions as they are.
    And directions stay nearer to the first layer's, where the source goes further than half-way.
    """
    assert budget.statistics is not None
    turns = [channels.turned_to_before() for channels in budget.statistics.channels]
    settings = [
        paired(turns, num_pairs, bits, group_size, recent_tokens)
        for num_pairs in range(min(1, len(turns) // 2), max(len(turns) // 4, 1) + 1)
        for bits in (0, 8, 4, 2)
        for group_size in (32, 64)
        for recent_tokens in (0, 32)
    ]
    smaller = [setting for setting in settings if budget.bytes_of(setting) < budget.bytes_of(budget.whole)]
    return budget.best_of([budget.whole, *smaller])


RECIPE = Recipe(
    id="minicache",
    resident="kv",
    title="pairs of deep layers share directions of keys and values, and keep lengths and the most different tokens",
    source=Source(
        "Liu, Liu, Pan, He, Haffari and Zhuang",
        2024,
        "MiniCache: KV Cache Compression in Depth Dimension for Large Language Models",
        "2405.14366",
    ),
    options=lambda: (),
    whole_cache=whole_cache,
    needs_statistics=True,
    published="up to 5.02 times smaller caches with 4 bits, about 5 times the throughput, LLaMA-2-7B on ShareGPT (abstract)",
    catalogue=("minicache",),
)
