"""Whole caches of every KV recipe on small sites, with made-up statistics: what contract tests run over."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from haversack.describe.site import AttentionSite
from haversack.parts.kv.base import KVLayer, KVOption
from haversack.parts.kv.low_rank import LowRankKV
from haversack.recipes.base import Recipe, all_recipes
from haversack.recipes.cache_budget import CacheBudget

CAPACITY_TOKENS = 400
SITES = tuple(AttentionSite(f"layer {i}", i, "module", 4, 2, 32, 32) for i in range(3))


class WithBefore:
    """A layer that is stored with the one before it, and that one, which sees the same tokens first, as it does in a model."""

    def __init__(self, before: KVLayer, layer: KVLayer):
        layer.join(before)
        self.before, self.layer = before, layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _both(self, name: str, *args: Any, **kwargs: Any) -> Any:
        getattr(self.before, name)(*args, **kwargs)
        return getattr(self.layer, name)(*args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return self._both("step", *args, **kwargs)

    def append(self, *args: Any, **kwargs: Any) -> None:
        self._both("append", *args, **kwargs)

    def reorder(self, *args: Any) -> None:
        self._both("reorder", *args)

    def resized(self, *args: Any) -> WithBefore:
        return WithBefore(self.before.resized(*args), self.layer.resized(*args))

    def state(self) -> dict[str, Any]:
        return {**self.layer.state(), **{f"before.{name}": x for name, x in self.before.state().items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        self.layer.load_state({name: x for name, x in state.items() if not name.startswith("before.")})
        start = "before."
        self.before.load_state({name[len(start) :]: x for name, x in state.items() if name.startswith(start)})


def build(option: KVOption, site: AttentionSite, **sizes: Any) -> Any:
    """A layer of the option; with the one before it where the two are stored together."""
    layer = option.build(site, **sizes)
    if not option.represent.joins:
        return layer
    return WithBefore(replace(option, represent=replace(option.represent, is_deeper=False)).build(site, **sizes), layer)  # type: ignore[call-arg]


def statistics() -> SimpleNamespace:
    """Layers and heads that differ, so that no budget is shared evenly."""
    curves = [[min(1.0, (i + 1) / 64 * slope) for i in range(64)] for slope in (1.0, 4.0, 2.0)]
    channels = SimpleNamespace(
        query_energy=[[1.0] * 32] * 2,
        key_energy=[[float(i) for i in range(32)], [float(i * 7 % 32) for i in range(32)]],
        value_energy=[[float(i) for i in range(32)], [1.0] * 32],
        fitted=lambda part, per_frequency=False: part,
        turned_to_before=LowRankKV,
    )
    return SimpleNamespace(
        channels=[channels] * len(SITES),
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
