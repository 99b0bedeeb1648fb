"""GUI-KV: tokens that are attended to or large, and first of all not those that the latest ones repeat."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.salience import SalientAttention
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import selection

RECIPE = Recipe(
    id="gui-kv",
    resident="kv",
    title="tokens that are attended to or large, and not repeated by the latest; all layers alike",
    source=Source(
        "Huang, Qiu, Dai, Xiong and Wu",
        2025,
        "GUI-KV: Efficient GUI Agents via KV Cache with Spatio-Temporal Awareness",
        "2510.00536",
    ),
    options=lambda: (),
    whole_cache=lambda budget: budget.everywhere(lambda n: KVOption(selection(SalientAttention, n))),
    published="38.9% fewer operations in decoding, 4.1% more exact steps with five screenshots (abstract)",
)
