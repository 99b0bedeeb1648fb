"""Episode attention: each head keeps the tokens that a representative piece of one episode of the text attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.kv.base import Selection

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EpisodeAttention(Selection):
    """Importance is the attention that the latest queries gave a token: those of an episode's guide where the text is read with one, else the block's own.

    A text is cut into segments of `segment_tokens`, which are sorted by topic into at most `num_episodes` episodes (`engine.episodes`); each is read with a
    guide, its most typical segment, which attends after every block and is not stored. Bytes: those of one episode's cache, whatever their number; the
    others' lie in files. Differs from the source in that heads choose for themselves, and that without a guide (decoding, `generate`) the latest queries decide.
    """

    id: ClassVar[str] = "kv.episode-attention"
    title: ClassVar[str] = "Tokens with the most attention from an episode's typical segment"
    source: ClassVar[Source | None] = Source(
        "Kim et al.", 2025, "EpiCache: Episodic KV Cache Management for Long Conversational Question Answering", "2509.17396", "section 3"
    )  # fmt: skip
    name: ClassVar[str] = "episode"
    memory: ClassVar[float] = 0.0

    num_episodes: int = 4
    segment_tokens: int = 48

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.id, "num_episodes", self.num_episodes, "1 or more", self.num_episodes >= 1)
        check_range(self.id, "segment_tokens", self.segment_tokens, "1 or more", self.segment_tokens >= 1)

    @property
    def label(self) -> str:
        return f"{super().label} of {self.num_episodes}"

    def received(self, probabilities: torch.Tensor, *, held_tokens: int) -> torch.Tensor:
        return probabilities.sum((2, 3))
