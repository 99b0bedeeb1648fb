"""Heavy hitters: each head keeps the tokens that have been given the most attention so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source
from haversack.parts.kv.base import Selection

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class HeavyHitters(Selection):
    """Importance is the attention that a token was given, summed over all queries since it came.

    Differs from the source in that tokens are freed a block at a time, and that sinks are protected by position.
    """

    id: ClassVar[str] = "kv.heavy-hitters"
    title: ClassVar[str] = "Tokens with the most attention so far"
    source: ClassVar[Source | None] = Source(
        "Zhang et al.", 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", "2306.14048", "section 4"
    )  # fmt: skip
    name: ClassVar[str] = "heavy"

    def received(self, probabilities: torch.Tensor, *, held_tokens: int) -> torch.Tensor:
        return probabilities.sum((2, 3))
