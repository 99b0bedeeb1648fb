"""Hydragen: a prefix that all sequences share is stored once, and attended to by all of them together."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.shared_prefix import SharedPrefixKV
from haversack.recipes.base import Recipe

RECIPE = Recipe(
    id="hydragen",
    resident="kv",
    title="what all sequences of a batch begin with once, in one product for all their queries",
    source=Source(
        "Juravsky, Brown, Ehrlich, Fu, Re and Mirhoseini",
        2024,
        "Hydragen: High-Throughput LLM Inference with Shared Prefixes",
        "2402.05099",
    ),
    options=lambda: tuple(KVOption(represent=SharedPrefixKV(tokens)) for tokens in (1024, 512, 128)),
    candidates=False,
    published="up to 32 times the throughput of competitive baselines, CodeLlama-13b (abstract)",
    catalogue=("hydragen",),
)
