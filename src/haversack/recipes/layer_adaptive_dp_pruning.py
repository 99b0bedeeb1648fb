"""Layer-adaptive pruning by dynamic programming: output distortions add up over layers, so that tables over bytes find the best sum."""

from __future__ import annotations

import math

from haversack.parts.base import Source
from haversack.recipes.allocation import Allocation, Chosen
from haversack.recipes.base import Recipe

STEPS = 4096
"""Into which the budget is cut at most: bytes are rounded up to them, where no common divisor is as large."""


def choose(asked: Allocation) -> Chosen:
    """Site after site, the least damage within every number of steps: linear in sites, choices and steps."""
    import numpy as np

    sizes = [choice.num_bytes for site in asked.sites for choice in site.choices]
    step = max(1, math.gcd(*sizes), asked.capacity_bytes // STEPS)
    room = asked.capacity_bytes // step
    least, taken = np.zeros(room + 1), []
    for site in asked.sites:
        offers = np.full((len(site.choices), room + 1), np.inf)
        for i, choice in enumerate(site.choices):
            width = -(-choice.num_bytes // step)
            if width <= room:
                offers[i, width:] = least[: room + 1 - width] + choice.damage
        taken.append(offers.argmin(0))
        least = offers.min(0)
    if not np.isfinite(least[room]):
        return (0,) * len(asked.sites)
    chosen: list[int] = []
    for site, best in zip(reversed(asked.sites), reversed(taken), strict=True):
        chosen.append(int(best[room]))
        room -= -(-site.choices[chosen[-1]].num_bytes // step)
    return tuple(reversed(chosen))


RECIPE = Recipe(
    id="layer-adaptive-dp-pruning",
    resident="weights",
    title="dynamic programming over what each matrix's options cost alone",
    source=Source(
        "Xu, Wang, Geng, Lin, Wu, Li, Lin",
        2023,
        "Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks",
        "2308.10438",
    ),
    options=tuple,
    choose=choose,
)
