"""Normalised attention: each head keeps the tokens that were given the most attention per query that could see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source
from haversack.parts.kv.base import Selection

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class NormalizedAttention(Selection):
    """Importance is attention summed over queries, divided by how many queries could see the token, so that old tokens have no start.

    Differs from the source, which marks tokens for higher precision by it, in that the others are freed, and in that every query counts, not a sample.
    """

    id: ClassVar[str] = "kv.normalized-attention"
    title: ClassVar[str] = "Tokens with the most attention per query that could see them"
    source: ClassVar[Source | None] = Source(
        "He et al.", 2024, "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification", "2405.14256", "equation 8"
    )  # fmt: skip
    name: ClassVar[str] = "normalized"

    def received(self, probabilities: torch.Tensor, *, held_tokens: int) -> torch.Tensor:
        return probabilities.sum((2, 3))

    def priority(
        self,
        importance: torch.Tensor,
        positions: torch.Tensor,
        counts: torch.Tensor,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return importance / (counts - positions).clamp_min(1)
