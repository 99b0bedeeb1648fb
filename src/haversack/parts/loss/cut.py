"""Cut cross entropy: log-likelihoods from blocks of logits, which are made again for the gradients and never held together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.ledger import DTYPE_BYTES
from haversack.parts.base import Source, check_range
from haversack.parts.loss.base import AS_IT_IS, IGNORED, HeadOutput, Loss

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CutCrossEntropy(Loss):
    """Holds blocks of `block_elements` logits instead of `tokens * vocab_size`, at the price of computing logits twice.

    Blocks are of as many tokens as there are, up to a fourth of their elements, by as much of the vocabulary as fits. Per element
    they take 4 bytes both ways in float32, and up to 12 for 16-bit matrices; besides, there are float32 sums of gradients of
    hidden states and of one block's rows. Ignored tokens cost nothing: they are taken out first. Error: that of another order of
    sums in float32; none is left out. Source: Wijmans et al. 2024, arXiv 2411.09009, algorithms 1 to 3; differs in that blocks
    run one after another in torch's own products, on any device, and small gradients are not skipped.
    """

    id: ClassVar[str] = "cut-cross-entropy"
    title: ClassVar[str] = "log-likelihoods and gradients from blocks of logits"
    source: ClassVar[Source] = Source(
        "Wijmans, Huval, Hertzberg, Koltun and Kraehenbuehl",
        2024,
        "Cut Your Losses in Large-Vocabulary Language Models",
        "2411.09009",
        "algorithms 1 to 3",
    )
    lossless: ClassVar[bool] = True

    block_elements: int = 2**21

    def __post_init__(self) -> None:
        check_range(self.id, "block_elements", self.block_elements, "16 or more", self.block_elements >= 16)

    def blocks(self, num_tokens: int, vocab_size: int) -> tuple[int, int]:
        """Tokens and rows of the vocabulary in a block."""
        tokens = max(1, min(num_tokens, self.block_elements // 256))
        return tokens, max(1, min(vocab_size, self.block_elements // tokens))

    def token_losses(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None = None,
        output: HeadOutput = AS_IT_IS,
    ) -> torch.Tensor:
        import torch

        from haversack.kernels.cut_cross_entropy import cut_cross_entropy

        counted = labels != IGNORED
        if bool(counted.all()):
            blocks = self.blocks(len(labels), len(weight))
            return cut_cross_entropy(hidden, weight, bias, labels, blocks, output.scale, output.softcap)
        index = counted.nonzero()[:, 0]
        blocks = self.blocks(len(index), len(weight))
        chosen = hidden.index_select(0, index)
        some = cut_cross_entropy(chosen, weight, bias, labels[index], blocks, output.scale, output.softcap)
        return torch.zeros(len(labels), device=labels.device).index_copy(0, index, some)

    def workspace_bytes(self, num_tokens: int, vocab_size: int, hidden_size: int, dtype: str) -> int:
        tokens, rows = self.blocks(num_tokens, vocab_size)
        wide = DTYPE_BYTES[dtype] == 4
        per_block = tokens * rows * (4 if wide else 8) + rows * hidden_size * (4 if wide else 8)
        return per_block + num_tokens * hidden_size * (0 if wide else 4) + 32 * num_tokens
