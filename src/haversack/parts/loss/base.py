"""The whole contract of loss parts: from the last hidden states and the head's matrix to each token's log-likelihood."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.parts.base import Part

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of a token that is not counted, as in torch and transformers."""


@dataclass(frozen=True)
class HeadOutput:
    """What a model does to its head's product `z`: `scale * z`, or `softcap * tanh(scale * z / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None


AS_IT_IS = HeadOutput()
"""The product itself."""


class Loss(Part):
    """A part of the loss."""

    resident: ClassVar[str] = "loss"
    stage: ClassVar[str] = "loss"

    @abstractmethod
    def token_losses(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None = None,
        output: HeadOutput = AS_IT_IS,
    ) -> torch.Tensor:
        """The negative log-likelihood of each label, float32 `(tokens,)`, in nats; 0 where the label is `IGNORED`.

        `hidden` is `(tokens, hidden_size)`, `weight` `(vocab_size, hidden_size)`, `bias` `(vocab_size,)`, `labels` `(tokens,)`.
        Differentiable in the first three and in `bias`.
        """

    @abstractmethod
    def workspace_bytes(self, num_tokens: int, vocab_size: int, hidden_size: int, dtype: str) -> int:
        """The most bytes held beside hidden states, weights and their gradients, both ways, for matrices of `dtype`."""


def mean_loss(token_losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over counted tokens, float32; not a number without any, as in torch."""
    return token_losses.sum() / (labels != IGNORED).sum()
