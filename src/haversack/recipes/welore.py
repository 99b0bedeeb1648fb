"""WeLore: low-rank matrices, of a rank that is chosen for each by what it loses."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.dropped import DroppedGrid
from haversack.parts.weights.low_rank import LowRankCorrection
from haversack.parts.weights.nearest import NearestRounding
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    ranks = (32, 64, 96, 128, 160, 192)
    return tuple(
        WeightOption(DroppedGrid(), NearestRounding(), corrections=(LowRankCorrection(rank),)) for rank in ranks
    )


RECIPE = Recipe(
    id="welore",
    resident="weights",
    title="matrices of low rank, each of its own",
    source=Source(
        "Jaiswal, Yin, Zhang, Liu, Zhao, Tian, Wang",
        2024,
        "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
        "2407.11239",
    ),
    options=options,
    candidates=False,
)
