"""KVMerger: what is evicted goes into its nearest kept key, weighed by a Gaussian kernel."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.heavy_hitters import HeavyHitters
from haversack.parts.kv.kernel_merging import KernelMerge
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import selection

RECIPE = Recipe(
    id="kvmerger",
    resident="kv",
    title="each head keeps heavy hitters and recent tokens, and the others are merged into them by a Gaussian kernel",
    source=Source(
        "Wang et al.",
        2024,
        "Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks",
        "2407.08454",
    ),
    options=lambda: (),
    whole_cache=lambda budget: budget.everywhere(lambda n: KVOption(selection(HeavyHitters, n), demote=KernelMerge())),
    published="better than H2O and CaM at 50% and 35% of the cache (abstract)",
)
