"""EvoPress: whole plans measured, mutated by trading one matrix's level for another's, the best kept."""

from __future__ import annotations

import random

from haversack.parts.base import Source
from haversack.recipes.allocation import Allocation, Chosen
from haversack.recipes.base import Recipe

GENERATIONS, OFFSPRING = 12, 4
"""The source runs hundreds of generations of 64 and more, and selects in stages on growing samples of text."""


def choose(asked: Allocation) -> Chosen:
    """From as many bits everywhere, `GENERATIONS` of `OFFSPRING`, each measured whole."""
    draw = random.Random(0)
    best = asked.uniform()
    least, seen = asked.measure(best), {best}
    for _ in range(GENERATIONS):
        children = {_mutated(asked, best, draw) for _ in range(OFFSPRING)} - seen
        seen |= children
        for child in sorted(children):
            if (damage := asked.measure(child)) < least:
                best, least = child, damage
    return best


def _mutated(asked: Allocation, parent: Chosen, draw: random.Random) -> Chosen:
    """One to three trades: a site goes up a level, others come down until all fit; then what has room goes up."""
    chosen = list(parent)
    for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
        up = draw.choice([i for i, site in enumerate(asked.sites) if chosen[i] + 1 < len(site.choices)] or [0])
        chosen[up] = min(chosen[up] + 1, len(asked.sites[up].choices) - 1)
        while not asked.fits(chosen) and (lower := [i for i in range(len(chosen)) if chosen[i] and i != up]):
            chosen[draw.choice(lower)] -= 1
    for i in draw.sample(range(len(chosen)), len(chosen)):
        more = [*chosen[:i], min(chosen[i] + 1, len(asked.sites[i].choices) - 1), *chosen[i + 1 :]]
        chosen = more if asked.fits(more) else chosen
    return tuple(chosen) if asked.fits(chosen) else parent


RECIPE = Recipe(
    id="evopress",
    resident="weights",
    title="evolutionary search over levels per matrix, whole plans measured",
    source=Source(
        "Sieberling, Kuznedelev, Kurtic, Alistarh",
        2024,
        "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search",
        "2410.14649",
    ),
    options=tuple,
    choose=choose,
)
