"""LQ-LoRA: a matrix split into a quantized and a low-rank part, in turns."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.parts.weights.low_rank import LowRankCorrection
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(
        WeightOption(
            grid=CodebookGrid(values, 32, "u4"), rounding=HessianFeedback(), corrections=(LowRankCorrection(4, 4),)
        )
        for values in ("max2", "max3")
    )


RECIPE = Recipe(
    id="lq-lora",
    resident="weights",
    title="codes on normal tables and a low-rank part, found in four turns",
    source=Source(
        "Guo, Greengard, Xing and Kim",
        2023,
        "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning",
        "2311.12023",
    ),
    options=options,
    candidates=False,
)
