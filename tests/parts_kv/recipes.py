"""Whole caches of every KV recipe on small sites, with made-up statistics: what contract tests run over."""

from __future__ import annotations

from types import SimpleNamespace

from haversack.describe.site import AttentionSite
from haversack.parts.kv.base import KVOption
from haversack.recipes.base import Recipe, all_recipes
from haversack.recipes.cache_budget import CacheBudget

CAPACITY_TOKENS = 400
SITES = tuple(AttentionSite(f"layer {i}", i, "module", 4, 2, 32, 32) for i in range(3))


def statistics() -> SimpleNamespace:
    """Layers and heads that differ, so that no budget is shared evenly."""
    curves = [[min(1.0, (i + 1) / 64 * slope) for i in range(64)] for slope in (1.0, 4.0, 2.0)]
    return SimpleNamespace(
        mass=SimpleNamespace(tolist=lambda: curves),
        dispersion=[3.0, 1.0, 2.0],
        shift=[0.1, 0.2, 0.1],
        retrieval=[[0.1, 0.9, 0.2, 0.3], [0.0, 0.1, 0.0, 0.0], [0.5, 0.1, 0.1, 0.1]],
        head_damage=[[0.9, 0.1], [0.0, 0.0], [0.2, 0.3]],
        eviction_damage=[1.2, 0.1, 0.5],
        tables=lambda part: [(tuple(range(2**part.bits)), tuple(range(-1, 2**part.bits - 1)))] * len(SITES),
    )


def asked(share: float, dtype: str = "F32") -> CacheBudget:
    whole = sum(KVOption().stored_bytes(s, batch_size=1, capacity_tokens=CAPACITY_TOKENS, dtype=dtype) for s in SITES)
    return CacheBudget(SITES, CAPACITY_TOKENS, dtype, int(share * whole), statistics())  # type: ignore[arg-type]


def whole_cache_recipes() -> list[Recipe]:
    return [recipe for recipe in all_recipes().values() if recipe.whole_cache is not None]


def recipe_options(share: float = 0.6) -> list[KVOption]:
    """Every distinct option of every recipe's whole cache at this share of the bytes."""
    options = [option for r in whole_cache_recipes() for option in r.whole_cache(asked(share))]  # type: ignore[misc]
    return list(dict.fromkeys(options))
