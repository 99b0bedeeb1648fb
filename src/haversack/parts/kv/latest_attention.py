"""Latest attention: each head keeps the tokens that the queries of the last block attended to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source
from haversack.parts.kv.base import Selection

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LatestAttention(Selection):
    """Importance is the attention that a token was given by the block of queries before tokens are freed, and by no earlier one.

    Differs from the source in that a block's queries are counted, where the source counts those of a few steps before each.
    """

    id: ClassVar[str] = "kv.latest-attention"
    title: ClassVar[str] = "Tokens with the most attention from the latest queries"
    source: ClassVar[Source | None] = Source(
        "Zhao, Wu and Wang", 2024, "ALISA: Accelerating Large Language Model Inference via Sparsity-Aware KV Caching", "2403.17312", "section 4"
    )  # fmt: skip
    name: ClassVar[str] = "latest"
    memory: ClassVar[float] = 0.0

    def received(self, probabilities: torch.Tensor, *, held_tokens: int) -> torch.Tensor:
        return probabilities.sum((2, 3))
