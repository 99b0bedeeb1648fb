"""Surprise: each head keeps the tokens that the model itself found least likely, old ones counting for less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.kv.base import Selection

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Surprise(Selection):
    """Importance is -log p of a token under what was read before it, in nats, times `decay` for every block of positions that was read since.

    All heads and layers keep the same tokens. Who reads must say what tokens are worth (`engine.reading`, `KVLayer.weigh`); tokens that nobody weighed are worth nothing.
    Differs from the source in that importance decays with each block instead of each turn of a dialogue, and that keys keep the rotary position they were computed at,
    so that sequences must stay within the positions that the model bears.
    """

    id: ClassVar[str] = "kv.surprise"
    title: ClassVar[str] = "Tokens that the model found least likely, fading with time"
    source: ClassVar[Source | None] = Source(
        "Yao, Li and Zhao", 2024, "SirLLM: Streaming Infinite Retentive LLM", "2405.12528", "section 3"
    )  # fmt: skip
    name: ClassVar[str] = "surprising"
    weighed: ClassVar[bool] = True

    decay: float = 0.98

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.id, "decay", self.decay, "above 0 and at most 1", 0 < self.decay <= 1)

    @property
    def memory(self) -> float:  # type: ignore[override]
        return self.decay

    @property
    def label(self) -> str:
        return f"{super().label} fading by {self.decay:g}"

    def received(self, probabilities: torch.Tensor, *, held_tokens: int) -> torch.Tensor:
        return probabilities.new_zeros(
            (*probabilities.shape[:2], probabilities.shape[-1])
        )  # never asked: tokens are weighed
