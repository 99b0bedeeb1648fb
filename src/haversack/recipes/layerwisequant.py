"""LayerwiseQuant: layers that change the hidden states most get the higher of two levels."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.recipes.allocation import Allocation, Chosen
from haversack.recipes.base import Recipe


def choose(asked: Allocation) -> Chosen:
    """The two levels around the budget's bits per weight; layers in order of how far they turn what passes them. What lies in no
    layer goes first."""
    bits = asked.bits_per_weight
    low = tuple(site.at_most(bits * site.num_weights / 8) for site in asked.sites)
    while not asked.fits(low) and any(low):
        low = tuple(max(0, i - 1) for i in low)
    high = tuple(min(i + 1, len(site.choices) - 1) for i, site in zip(low, asked.sites, strict=True))
    change = asked.layer_change()
    rank = [float("inf") if site.layer is None else change[site.layer] for site in asked.sites]
    return asked.in_order(sorted(range(len(rank)), key=lambda i: (-rank[i], i)), low, high)


RECIPE = Recipe(
    id="layerwisequant",
    resident="weights",
    title="two levels of bits, the higher for layers that change their input most",
    source=Source(
        "Dumitru, Yadav, Maheshwary, Clotan, Madhusudhan, Surdeanu",
        2024,
        "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond Integer Bit-Levels",
        "2406.17415",
    ),
    options=tuple,
    choose=choose,
)
