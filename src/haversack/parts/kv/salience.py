"""Salience and novelty: each head keeps tokens that are attended to or large, and first frees those that the latest ones repeat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.kv.base import Selection

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SalientAttention(Selection):
    """What is kept goes by the attention of the latest queries plus `saliency` times the value's norm, both over their means, times how much of a value lies outside
    the main directions of the latest tokens' values.

    Differs from the source in that values stand for hidden states, which a cache does not see, and for keys, which are rotated by their positions, so that the same
    picture twice has other keys and equal values; and in that the latest tokens are the protected ones and the last block, where the source knows frames.
    """

    id: ClassVar[str] = "kv.salience"
    title: ClassVar[str] = "Tokens that are attended to or large, and not repeated by the latest ones"
    source: ClassVar[Source | None] = Source(
        "Huang, Qiu, Dai, Xiong and Wu", 2025, "GUI-KV: Efficient GUI Agents via KV Cache with Spatio-Temporal Awareness", "2510.00536"
    )  # fmt: skip
    name: ClassVar[str] = "salient"
    memory: ClassVar[float] = 0.0
    reads_values: ClassVar[bool] = True

    saliency: float = 0.5
    num_directions: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.id, "saliency", self.saliency, "0 or more", self.saliency >= 0)
        check_range(self.id, "num_directions", self.num_directions, "0 or more", self.num_directions >= 0)

    @property
    def label(self) -> str:
        return f"{super().label} by {self.saliency:g} beyond {self.num_directions}"

    def received(self, probabilities: torch.Tensor, *, held_tokens: int) -> torch.Tensor:
        return probabilities.sum((2, 3))

    def priority(
        self,
        importance: torch.Tensor,
        positions: torch.Tensor,
        counts: torch.Tensor,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert values is not None
        size = values.norm(dim=-1)
        worth = _over_mean(importance) + self.saliency * _over_mean(size)
        latest = positions >= counts - max(self.recent_tokens, self.block_tokens)
        inside = (values @ self._directions(values, latest)).square_().sum(-1)
        novelty = (1 - inside / size.square().clamp_min_(1e-12)).clamp_min_(0)
        return worth * novelty.where(~latest, 1.0)

    def _directions(self, values: torch.Tensor, latest: torch.Tensor) -> torch.Tensor:
        """Main directions of the latest values of each head: `(batch, kv_heads, head_dim, num_directions)`."""
        import torch

        gram = values.transpose(-1, -2) @ (values * latest[..., None])
        number = min(self.num_directions, values.shape[-1] - 1)
        return torch.linalg.eigh(gram).eigenvectors[..., values.shape[-1] - number :]


def _over_mean(x: torch.Tensor) -> torch.Tensor:
    return x / x.mean(-1, keepdim=True).clamp_min(1e-12)
