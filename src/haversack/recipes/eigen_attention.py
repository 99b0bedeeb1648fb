"""Eigen Attention: attention in the few directions of each head that calibration text uses most."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.recipes.base import Recipe

RECIPE = Recipe(
    id="eigen-attention",
    resident="kv",
    title="each head's keys and values by their calibrated principal directions",
    source=Source(
        "Saxena, Saha, Choudhary and Roy",
        2024,
        "Eigen Attention: Attention in Low-Rank Space for KV Cache Compression",
        "2408.05646",
    ),
    options=lambda: (),
    whole_cache=lambda budget: budget.low_rank(1, 64),
    needs_statistics=True,
    published="KV caches up to 40% smaller, with up to 60% less attention latency and a minimal drop in performance (abstract)",
)
