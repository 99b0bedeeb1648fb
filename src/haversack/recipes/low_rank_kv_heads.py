"""Low-rank KV heads: two KV heads share what is stored, in the directions that their queries need."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.recipes.base import Recipe

RECIPE = Recipe(
    id="low-rank-kv-heads",
    resident="kv",
    title="pairs of KV heads stored as one, by calibrated directions that commute with rotation",
    source=Source(
        "Yu, Yang, Li, Li and Wu",
        2024,
        "Effectively Compress KV Heads for LLM",
        "2406.07056",
    ),
    options=lambda: (),
    whole_cache=lambda budget: budget.low_rank(2, 64, per_frequency=True),
    needs_statistics=True,
    published="half to three quarters of the KV heads compressed at the original models' performance (abstract)",
    catalogue=("low-rank-kv-head-compression",),
)
