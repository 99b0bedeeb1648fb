"""SpQR: outliers sparse in 16 bits, small groups with second-level scales, second-order feedback."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.parts.weights.outliers import SparseOutliers
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return tuple(
        WeightOption(
            grid=CodebookGrid(values, 16, "u4"), rounding=HessianFeedback(), corrections=(SparseOutliers(0.01),)
        )
        for values in ("max2", "max3", "max4")
    )


RECIPE = Recipe(
    id="spqr",
    resident="weights",
    title="one outlier in a hundred kept in 16 bits, the rest in groups of 16 with 4-bit scales",
    source=Source(
        "Dettmers, Svirschevski, Egiazarian, Kuznedelev, Frantar, Ashkboos, Borzunov, Hoefler and Alistarh",
        2023,
        "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression",
        "2306.03078",
    ),
    options=options,
    candidates=False,
)
