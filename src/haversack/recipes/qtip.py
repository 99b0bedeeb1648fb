"""QTIP: rotated weights in trellis codes, searched with second-order feedback."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.beam import BeamFeedback
from haversack.parts.weights.hadamard import HadamardRotation
from haversack.parts.weights.trellis import TrellisGrid
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(
        WeightOption(transforms=(HadamardRotation(),), grid=TrellisGrid(bits), rounding=BeamFeedback())
        for bits in (2, 3, 4)
    )


RECIPE = Recipe(
    id="qtip",
    resident="weights",
    title="trellis codes along rotated rows, one scale per row, beam search with second-order feedback",
    source=Source(
        "Tseng, Sun, Hou and De Sa",
        2024,
        "QTIP: Quantization with Trellises and Incoherence Processing",
        "2406.11235",
    ),
    options=options,
    candidates=False,  # until kernels read these forms: decoding tiles costs many times the time
)
