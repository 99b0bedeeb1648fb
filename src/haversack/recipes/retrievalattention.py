"""RetrievalAttention: a window on the device, all other keys and values on another tier under an index."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.key_cells import KeyCells
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import CacheBudget, Options

SCAN_SHARE = 1 / 4


def whole_cache(budget: CacheBudget) -> Options:
    """The longest window that fits; a quarter of all keys scanned per step, and half of those attended to."""
    scan = max(2, int(SCAN_SHARE * budget.capacity_tokens))
    return budget.everywhere(lambda n: KVOption(represent=KeyCells(scan // 2, n, scan_tokens=scan)))


RECIPE = Recipe(
    id="retrievalattention",
    resident="kv",
    title="a recent window on the device, older keys and values on another tier in cells of which a step scans a few",
    source=Source(
        "Liu, Chen, Lu, Jiang, Han, Zhang, Chen, Zhang, Ding, Zhang, Chen, Yang, Yang and Qiu",
        2024,
        "RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval",
        "2409.10516",
    ),
    options=lambda: (KVOption(represent=KeyCells()),),
    whole_cache=whole_cache,
    candidates=False,
    published="1 to 3% of the data read; 128K tokens of an 8B model in 16 GB, 0.188 seconds per token on an RTX4090 (abstract)",
)
