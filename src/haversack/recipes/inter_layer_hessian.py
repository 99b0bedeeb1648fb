"""Sensitivities with terms between layers: an order of matrices, and how far down it the lower level may go."""

from __future__ import annotations

from itertools import pairwise

from haversack.parts.base import Source
from haversack.recipes.allocation import Allocation, Chosen
from haversack.recipes.base import Recipe


def choose(asked: Allocation) -> Chosen:
    """Of the two levels around the budget, the higher for the sites of the most damage per byte spared. A layer's share of what it and the next cost
    together beyond their sum, measured in pairs of layers, is added to its sites."""
    bits = asked.bits_per_weight
    low = tuple(site.at_most(bits * site.num_weights / 8) for site in asked.sites)
    while not asked.fits(low) and any(low):
        low = tuple(max(0, i - 1) for i in low)
    high = tuple(min(i + 1, len(site.choices) - 1) for i, site in zip(low, asked.sites, strict=True))
    extra = _between_layers(asked, low)
    scores = []
    for i, site in enumerate(asked.sites):
        worse, better = site.choices[low[i]], site.choices[high[i]]
        gained = worse.damage * (1 + extra.get(site.layer, 0.0)) - better.damage
        scores.append(gained / max(1, better.num_bytes - worse.num_bytes))
    return asked.in_order(sorted(range(len(scores)), key=lambda i: (-scores[i], i)), low, high)


def _between_layers(asked: Allocation, low: Chosen) -> dict[int | None, float]:
    """By layer: what it and its neighbours cost together beyond their sum, over what it costs alone."""
    top = tuple(len(site.choices) - 1 for site in asked.sites)

    def damage(*layers: int) -> float:
        lowered = zip(asked.sites, low, top, strict=True)
        return asked.measure(tuple(below if site.layer in layers else above for site, below, above in lowered))

    layers = sorted({site.layer for site in asked.sites if site.layer is not None})
    alone = {layer: damage(layer) for layer in layers}
    extra = dict.fromkeys(layers, 0.0)
    for first, second in pairwise(layers):
        both = (damage(first, second) - alone[first] - alone[second]) / 2
        for layer in (first, second):
            extra[layer] += both / max(alone[layer], 1e-12)
    return {layer: max(-0.9, ratio) for layer, ratio in extra.items()}


RECIPE = Recipe(
    id="inter-layer-hessian-mixed-precision-ptq",
    resident="weights",
    title="two levels of bits by sensitivities that know what neighbouring layers do together",
    source=Source(
        "Schaefer, Lambert-Shirzad, Zhang, Chou, Jablin, Li, Guo, Stanton, Joshi, Wang",
        2023,
        "Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training Quantization",
        "2306.04879",
    ),
    options=tuple,
    choose=choose,
)
