"""Token windows: heads choose stretches of neighbouring tokens instead of single ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.kv.base import Selection

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TokenWindows(Selection):
    """Importance is the attention that the latest block's queries gave a token; what is kept goes by its mean over the `window_tokens` positions of a
    token's stretch, as far as they are still held.

    Differs from the source in that tasks are not told apart and that every layer chooses for itself.
    """

    id: ClassVar[str] = "kv.token-windows"
    title: ClassVar[str] = "Stretches of neighbouring tokens with the most attention from the latest queries"
    source: ClassVar[Source | None] = Source(
        "Zuo et al.", 2025, "WindowKV: Task-Adaptive Group-Wise KV Cache Window Selection for Efficient LLM Inference", "2503.17922", "section 3"
    )  # fmt: skip
    name: ClassVar[str] = "windows"
    memory: ClassVar[float] = 0.0

    window_tokens: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.id, "window_tokens", self.window_tokens, "1 or more", self.window_tokens >= 1)

    @property
    def label(self) -> str:
        return f"{super().label} of {self.window_tokens}"

    def received(self, probabilities: torch.Tensor, *, held_tokens: int) -> torch.Tensor:
        return probabilities.sum((2, 3))

    def priority(
        self,
        importance: torch.Tensor,
        positions: torch.Tensor,
        counts: torch.Tensor,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        import torch

        stretch, order = (positions // self.window_tokens).sort(dim=2)
        begins = torch.nn.functional.pad(stretch.diff(dim=2) != 0, (1, 0))
        number = torch.empty_like(order).scatter_(2, order, begins.cumsum(2))  # of a slot's stretch among those held
        total = torch.zeros_like(importance).scatter_add_(2, number, importance)
        held = torch.zeros_like(importance).scatter_add_(2, number, torch.ones_like(importance))
        return total.div_(held.clamp_min_(1)).gather(2, number)
