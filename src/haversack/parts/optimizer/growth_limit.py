"""A norm that may grow by a given factor from step to step, and no faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def limit_growth(update: torch.Tensor, last_norm: torch.Tensor, most: float) -> torch.Tensor:
    """`update`, scaled down in place so that its norm is at most `most` times the last one's, which is then replaced.

    `last_norm` is a float32 scalar, 0 before the first step; the first norm is not limited. A spike is cut, and what was cut
    off is not made up for. Source: Chen et al. 2024, arXiv 2410.01623, equation 6.
    """
    norm = update.norm(dtype=last_norm.dtype)
    last = last_norm.item()
    if last and norm.item() > most * last:
        update.mul_(most * last / norm.item())
        last_norm.mul_(most)
    else:
        last_norm.copy_(norm)
    return update
