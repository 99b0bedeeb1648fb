"""Where the pieces begin in which a tensor is walked: all of them, or, where there are no values, those that tell what any holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

SHOWN_PIECES = 2
"""Of a tensor without values, beside the last: from the second on, each piece is made beside what is left of the one before, and holds as much. The
moments in blocks of a 7B model are some 50,000 pieces, and 100,000 tokens' logits 1,600."""


def piece_starts(num: int, length: int, of: torch.Tensor, first: int = 0) -> Sequence[int]:
    """Where pieces of `length` begin among `num` numbers, from `first` on; `of` is the tensor that is walked."""
    starts = range(first, num, length)
    has_values = of.device.type != "meta" and not isinstance(of, FakeTensor)
    if has_values or len(starts) <= SHOWN_PIECES:
        return starts
    return [*starts[:SHOWN_PIECES], starts[-1]]
