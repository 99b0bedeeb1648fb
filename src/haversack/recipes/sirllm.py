"""SirLLM: sinks, recent tokens, and those that surprised the model most, however long the stream."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.surprise import Surprise
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import selection

RECIPE = Recipe(
    id="sirllm",
    resident="kv",
    title="recent tokens and those that the model found least likely, fading with time",
    source=Source("Yao, Li and Zhao", 2024, "SirLLM: Streaming Infinite Retentive LLM", "2405.12528"),
    options=lambda: (),
    whole_cache=lambda budget: budget.everywhere(lambda n: KVOption(selection(Surprise, n))),
    catalogue=("sirllm",),
)
