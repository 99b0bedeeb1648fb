"""Persistence of importance: each head keeps the tokens that were lately given more than their share, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source
from haversack.parts.kv.base import Selection

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Persistence(Selection):
    """Importance is how many recent queries gave a token more than an even share of their attention.

    Differs from the source in that counts fade by `memory` from block to block instead of ending with a history window, so that no history is stored.
    """

    id: ClassVar[str] = "kv.persistence"
    title: ClassVar[str] = "Tokens that recent queries gave more than an even share"
    source: ClassVar[Source | None] = Source(
        "Liu et al.", 2023, "Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression at Test Time",
        "2305.17118", "algorithm 2",
    )  # fmt: skip
    name: ClassVar[str] = "persistent"
    memory: ClassVar[float] = 0.8

    def received(self, probabilities: torch.Tensor, *, held_tokens: int) -> torch.Tensor:
        return probabilities.gt_(1 / held_tokens).sum((2, 3))
