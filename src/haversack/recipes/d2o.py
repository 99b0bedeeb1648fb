"""D2O: layers share the budget by how densely they attend, and what they evict is merged into what they keep."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.heavy_hitters import HeavyHitters
from haversack.parts.kv.merging import Merge
from haversack.recipes.base import Recipe
from haversack.recipes.cache_budget import CacheBudget, Options, selection


def whole_cache(budget: CacheBudget) -> Options:
    """Tokens in proportion to the entropy of a layer's attention: the more it is spread, the more must be kept. The source tells two kinds of layers apart
    by the variance of their attention, and gives the dense ones more."""
    assert budget.statistics is not None
    return budget.shared(lambda n: KVOption(selection(HeavyHitters, n), demote=Merge()), budget.statistics.dispersion)


RECIPE = Recipe(
    id="d2o",
    resident="kv",
    title="layers share by the spread of their attention, and evicted tokens are merged into kept ones",
    source=Source(
        "Wan et al.",
        2024,
        "D2O: Dynamic Discriminative Operations for Efficient Generative Inference of Large Language Models",
        "2406.13035",
    ),
    options=lambda: (),
    whole_cache=whole_cache,
    needs_statistics=True,
    published="more than 3 times the throughput (abstract)",
    catalogue=("d2o",),
)
