"""Voting heads: few query heads of a layer, those that find things again, choose the tokens that all its heads keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.kv.base import Selection

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class VotingHeads(Selection):
    """Importance is the attention that the query heads `voters` gave a token, summed over them and over all queries since it came.

    All KV heads keep the same tokens. Differs from the source in that importance adds up over the whole sequence, where the source looks at
    the prompt's last queries, and in that tokens are freed a block at a time.
    """

    id: ClassVar[str] = "kv.voting-heads"
    title: ClassVar[str] = "Tokens that a layer's retrieval heads attend to, kept by all its heads"
    source: ClassVar[Source | None] = Source(
        "Lin et al.", 2025, "CompressKV: Semantic Retrieval Heads Know What Tokens are Not Important Before Generation", "2508.02401", "section 4"
    )  # fmt: skip
    name: ClassVar[str] = "voted"

    voters: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "voters", tuple(self.voters))  # JSON has lists
        whole = all(isinstance(head, int) and head >= 0 for head in self.voters)
        check_range(
            self.id, "voters", self.voters, "query heads, 0 or more each, one at least", bool(self.voters) and whole
        )

    @property
    def label(self) -> str:
        return f"{super().label} by {','.join(map(str, self.voters))}"

    def received(self, probabilities: torch.Tensor, *, held_tokens: int) -> torch.Tensor:
        by_query_head = probabilities.sum(3).flatten(1, 2)  # (batch, heads, tokens)
        votes = by_query_head[:, list(self.voters)].sum(1, keepdim=True)
        return votes.expand(-1, probabilities.shape[1], -1)
