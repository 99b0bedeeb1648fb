"""WTA-CRS: gradients of weights from few rows of the inputs, right on average."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.recipes.base import Recipe, Setting

RECIPE = Recipe(
    id="wta-crs",
    resident="activations",
    title="some rows of linears' inputs kept, the largest for certain, with --with saved=sampled",
    source=Source(
        "Liu, Wang, Zhong, Xu, Zha, Tang, Jiang, Zhou, Chaudhary, Xu and Hu",
        2023,
        "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model",
        "2305.15265",
    ),
    options=lambda: (Setting("saved", "sampled"),),
    published="up to 2.7 times less peak memory, up to 6.4 times larger batches (abstract)",
    catalogue=("wta-crs",),
)
