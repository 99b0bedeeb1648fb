"""PrefixKV: every layer keeps so many tokens that the same share of its attention is kept."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.heavy_hitters import HeavyHitters
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import CacheBudget, Options, selection

STEPS = 1000
"""Thresholds that are tried, as shares of the attention mass; all of it is every token."""


def whole_cache(budget: CacheBudget) -> Options:
    """The largest share of attention mass for which every layer's smallest sufficient prefix of its tokens, by importance, fits together."""
    assert budget.statistics is not None
    curves = budget.statistics.mass.tolist()

    def at(step: int) -> Options:
        shares = [sum(mass < step / STEPS or step == STEPS for mass in curve) / len(curve) for curve in curves]
        return tuple(KVOption(selection(HeavyHitters, round(share * budget.most_tokens))) for share in shares)

    return budget.largest(at, STEPS)


RECIPE = Recipe(
    id="prefixkv",
    resident="kv",
    title="layers keep as many tokens as hold one common share of their attention, found by binary search",
    source=Source(
        "Wang et al.",
        2024,
        "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation",
        "2412.03409",
    ),
    options=lambda: (),
    whole_cache=whole_cache,
    needs_statistics=True,
    catalogue=("prefixkv",),
)
