"""NF4: codes at the quantiles of a normal distribution, one scale per block of 64."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.recipes.base import Recipe


def options() -> tuple[WeightOption, ...]:
    return (WeightOption(grid=CodebookGrid("nf4", 64, search=False), rounding=NearestRounding()),)


RECIPE = Recipe(
    id="nf4",
    resident="weights",
    title="16 values at normal quantiles, scales by each block's extreme",
    source=Source(
        "Dettmers, Pagnoni, Holtzman and Zettlemoyer",
        2023,
        "QLoRA: Efficient Finetuning of Quantized LLMs",
        "2305.14314",
    ),
    options=options,
    published="mean perplexity on Pile Common Crawl of OPT, BLOOM, LLaMA and Pythia: NF4 with double quantization 27.41, "
    "Int4 34.34, Float4 (E2M1) 31.07 (Table 2 of the paper)",
    candidates=False,
)
