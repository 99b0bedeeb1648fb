"""BAQ: bits from a closed form under which every weight loses as much."""

from __future__ import annotations

import math

from haversack.parts.base import Source
from haversack.recipes.allocation import Allocation, AllocationSite, Chosen
from haversack.recipes.base import Recipe

_LEAST = 1e-12


def choose(asked: Allocation) -> Chosen:
    """With damage `c 2^(-2 bits)` per weight, the least sum has `bits = level + log2(c) / 2`: the level is found by bisection,
    after each site has taken its largest choice within its bits."""
    half_logs = [_half_log(site) for site in asked.sites]

    def at(level: float) -> Chosen:
        wanted = zip(asked.sites, half_logs, strict=True)
        return tuple(site.at_most((level + half) * site.num_weights / 8) for site, half in wanted)

    return asked.by_level(at, -64.0, 128.0)


def _half_log(site: AllocationSite) -> float:
    """`log2(c) / 2`, the mean over the site's lossy choices."""
    found = [
        (math.log2(max(choice.damage, _LEAST) / site.num_weights) + 2 * 8 * choice.num_bytes / site.num_weights) / 2
        for choice in site.choices
        if choice.damage > 0
    ]
    return sum(found) / len(found) if found else 0.0


RECIPE = Recipe(
    id="baq",
    resident="weights",
    title="bits per matrix from a closed form of equal loss",
    source=Source(
        "Zhang, Wang, Lasaulce, Debbah",
        2025,
        "BAQ: Efficient Bit Allocation Quantization for Large Language Models",
        "2506.05664",
    ),
    options=tuple,
    choose=choose,
)
