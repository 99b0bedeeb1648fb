"""Elastic Cache: what matters less is averaged into the anchors that stand nearest."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.anchor_merging import AnchorMerge
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.heavy_hitters import HeavyHitters
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import selection

RECIPE = Recipe(
    id="elastic-cache",
    resident="kv",
    title="each head keeps heavy hitters and recent tokens, and the others are averaged into their neighbours",
    source=Source(
        "Liu, Liu, Wang, Dong, Chen, Rao, Krishna and Lu",
        2024,
        "Efficient Inference of Vision Instruction-Following Models with Elastic Cache",
        "2407.18121",
    ),
    options=lambda: (),
    whole_cache=lambda budget: budget.everywhere(lambda n: KVOption(selection(HeavyHitters, n), demote=AnchorMerge())),
)
