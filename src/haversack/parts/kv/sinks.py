"""Attention sinks and a recent window: the first tokens and the last ones are held, the rest dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.kv.base import Regions, Score


@dataclass(frozen=True)
class SinksAndWindow(Score):
    """Hold the first `sink_tokens` (0 or more) and the last `window_tokens` (1 or more) of every sequence.

    Bytes: those of `sink_tokens + window_tokens` tokens at any length. Error: everything in between is lost; none for
    sequences no longer than that. A query attends to itself besides. Differs from the source in that keys keep the
    rotary position they were computed at (the source renumbers positions inside the cache), so sequences must stay
    within the model's position limit.
    """

    id: ClassVar[str] = "kv.sinks-and-window"
    title: ClassVar[str] = "Attention sinks and a recent window"
    source: ClassVar[Source | None] = Source(
        "Xiao et al.", 2023, "Efficient Streaming Language Models with Attention Sinks", "2309.17453", "section 3.2"
    )

    sink_tokens: int = 4
    window_tokens: int = 1020

    @property
    def label(self) -> str:
        return f"sinks {self.sink_tokens} window {self.window_tokens}"

    def __post_init__(self) -> None:
        check_range(self.id, "sink_tokens", self.sink_tokens, "0 or more", self.sink_tokens >= 0)
        check_range(self.id, "window_tokens", self.window_tokens, "1 or more", self.window_tokens >= 1)

    def regions(self, capacity_tokens: int) -> Regions:
        if capacity_tokens <= self.sink_tokens + self.window_tokens:
            return Regions(0, capacity_tokens, drops=False)
        return Regions(self.sink_tokens, self.window_tokens, drops=True)
