"""Pairs of answers in a batch: log-likelihoods of whole answers from those of their tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pairs:
    """`sequences` `(batch_size, seq_len)` int64 says which answer a token belongs to: pair i's chosen one is 2i, its rejected one
    2i + 1. `reference` are the answers' log-likelihoods before tuning, float32 `(2 * num_pairs,)`, where a loss asks for them."""

    sequences: torch.Tensor
    num_pairs: int
    reference: torch.Tensor | None = None

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over each answer of what is given for the next token of each token but a row's last, `(batch_size * (seq_len - 1),)`:
        float32 `(num_pairs, 2)`."""
        of = self.sequences[:, 1:].reshape(-1)
        sums = torch.zeros(2 * self.num_pairs, device=values.device).index_add(0, of, values.float())
        return sums.view(self.num_pairs, 2)
