"""Whole logits: the head's product and its log-softmax, for all tokens at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.ledger import DTYPE_BYTES
from haversack.parts.loss.base import AS_IT_IS, IGNORED, HeadOutput, Loss

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class WholeLogits(Loss):
    """torch's own cross entropy over logits widened to float32: three times `4 * tokens * vocab_size` bytes."""

    id: ClassVar[str] = "whole-logits"
    title: ClassVar[str] = "all logits at once"
    lossless: ClassVar[bool] = True

    def token_losses(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None = None,
        output: HeadOutput = AS_IT_IS,
    ) -> torch.Tensor:
        import torch.nn.functional as F

        logits = F.linear(hidden, weight, bias).float()
        if output.scale != 1:
            logits = logits * output.scale
        if output.softcap is not None:
            logits = (logits / output.softcap).tanh() * output.softcap
        return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)

    def workspace_bytes(self, num_tokens: int, vocab_size: int, hidden_size: int, dtype: str) -> int:
        return num_tokens * vocab_size * (3 * 4 + (0 if DTYPE_BYTES[dtype] == 4 else DTYPE_BYTES[dtype]))
