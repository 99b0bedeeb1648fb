"""LServe: streaming heads hold a window, the others everything, of which a step reads as many pages at any length."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.pages import PagedKV
from haversack.recipes import duoattention
from haversack.recipes.base import Recipe

RECIPE = Recipe(
    id="lserve",
    resident="kv",
    title="heads that find things again hold every token and read a few pages of them, the others sinks and a recent window",
    source=Source(
        "Yang, Guo, Tang, Hu, Xiao, Tang, Lin, Liu, Lu and Han",
        2025,
        "LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention",
        "2502.14866",
    ),
    options=lambda: tuple(KVOption(represent=PagedKV(read_pages=pages)) for pages in (8, 16, 32)),
    whole_cache=lambda budget: duoattention.whole_cache(budget, KVOption(represent=PagedKV())),
    needs_statistics=True,
    candidates=False,
    published="prefill up to 2.9 times and decoding 1.3 to 2.1 times as fast as vLLM (abstract)",
    catalogue=("lserve",),
)
