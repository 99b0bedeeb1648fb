"""The whole contract of preference losses: from log-likelihoods of a chosen and a rejected answer to a loss for the pair."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Part

if TYPE_CHECKING:
    import torch


class Preference(Part):
    """A loss over pairs of answers to one prompt, of which one was chosen and one rejected."""

    resident: ClassVar[str] = "loss"
    stage: ClassVar[str] = "preference"
    uses_reference: ClassVar[bool]
    """Whether it compares with the log-likelihoods that the model gave before it was tuned: 8 bytes per pair, once made."""

    @abstractmethod
    def pair_losses(
        self, log_likelihoods: torch.Tensor, num_tokens: torch.Tensor, reference: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each pair's loss, and by how much its chosen answer is preferred (above 0: it is), float32 `(pairs,)` both.

        `log_likelihoods` are sums over an answer's tokens in nats, float32 `(pairs, 2)`: chosen, rejected. `num_tokens` counts these
        tokens, `reference` are the log-likelihoods before tuning, of the same shape.
        """
