"""Which option each matrix gets within a byte budget: what published choosers are given, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

Chosen = tuple[int, ...]
"""Index of the choice of every site."""


@dataclass(frozen=True)
class Choice:
    """An option at a site: its label, what it stores, and what it alone costs, in nats per token."""

    label: str
    num_bytes: int
    damage: float


@dataclass(frozen=True)
class AllocationSite:
    """A matrix and its choices, from fewest to most bytes, each of less damage than those before it."""

    id: str
    layer: int | None
    num_weights: int
    choices: tuple[Choice, ...]

    def at_most(self, num_bytes: float) -> int:
        """The largest choice within so many bytes; the smallest where none is."""
        return max((i for i, c in enumerate(self.choices) if c.num_bytes <= num_bytes), default=0)


def front(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Those that none beats in bytes and damage at once, from fewest to most bytes."""
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.num_bytes, c.damage)):
        if not found or choice.damage < found[-1].damage:
            found.append(choice)
    return tuple(found)


@dataclass(frozen=True)
class Allocation:
    """The question: all sites within `capacity_bytes`. `measure` is the damage of a whole solution, `layer_change` how far each layer
    turns the hidden states that pass it (1 less the cosine), both measured on the model when first asked for."""

    sites: tuple[AllocationSite, ...]
    capacity_bytes: int
    measure: Callable[[Chosen], float]
    layer_change: Callable[[], Mapping[int, float]]

    def num_bytes(self, chosen: Sequence[int]) -> int:
        return sum(site.choices[i].num_bytes for site, i in zip(self.sites, chosen, strict=True))

    def fits(self, chosen: Sequence[int]) -> bool:
        return self.num_bytes(chosen) <= self.capacity_bytes

    def damage(self, chosen: Sequence[int]) -> float:
        """The sum of what the choices cost alone."""
        return sum(site.choices[i].damage for site, i in zip(self.sites, chosen, strict=True))

    @cached_property
    def bits_per_weight(self) -> float:
        return 8 * self.capacity_bytes / sum(site.num_weights for site in self.sites)

    def by_level(self, choose: Callable[[float], Chosen], low: float, high: float, turns: int = 60) -> Chosen:
        """`choose(level)` at the highest level that fits, of those that bisection meets; more level is more bytes."""
        best = choose(low)
        for _ in range(turns):
            middle = (low + high) / 2
            chosen = choose(middle)
            if self.fits(chosen):
                best, low = chosen, middle
            else:
                high = middle
        return best

    def uniform(self) -> Chosen:
        """As many bits per weight everywhere as fit."""
        return self.by_level(
            lambda bits: tuple(site.at_most(bits * site.num_weights / 8) for site in self.sites), 0.0, 64.0
        )

    def in_order(self, order: Sequence[int], low: Sequence[int], high: Sequence[int]) -> Chosen:
        """`high` choices for as many sites, first in `order`, as fit; `low` ones for the others."""
        chosen = list(low)
        steps = accumulate(
            self.sites[i].choices[high[i]].num_bytes - self.sites[i].choices[low[i]].num_bytes for i in order
        )
        room = self.capacity_bytes - self.num_bytes(low)
        for i, taken in zip(order, steps, strict=True):
            if taken <= room:
                chosen[i] = high[i]
        return tuple(chosen)
