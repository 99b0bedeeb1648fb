"""Clipping search: the scale of every group under which its rounded values are nearest to its weights, on any grid.

Which scales are tried is the grid's own business: from one that covers the group's extremes down to one that clips them hard, since
fewer levels clip harder. Then one refit: the least-squares scale under the values chosen. Source: Nagel et al. 2021
(arXiv 2106.08295, section 2.3); differs in weighting by importance and in the refit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from haversack.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from haversack.parts.weights.decoded import DecodedGrid

BLOCK_ELEMENTS = 2**18
"""Elements that a search handles at once: its temporaries stay in a core's cache, and its workspace in a few MiB."""


def search_scales(
    weight: torch.Tensor,
    importance: torch.Tensor,
    unit_values: Callable[[torch.Tensor], torch.Tensor],
    candidates: Iterable[torch.Tensor],
) -> torch.Tensor:
    """The best scale `(rows, groups)` of each group of `weight` `(rows, groups, width)`.

    `importance` `(groups, width)` weighs squared errors. `unit_values` rounds weights over their scale to the grid's
    values at scale 1; `candidates` are scales `(rows, groups)`. A scale of zero stands for a group of zeros.
    """
    import torch

    best: torch.Tensor | None = None
    best_error = torch.empty(0)
    best_values = torch.empty(0)

    for scale in candidates:
        values, error = _rounded(weight, importance, unit_values, scale)
        if best is None:
            best, best_error, best_values = scale, error, values
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
        best_values = torch.where(better[..., None], values, best_values)
    assert best is not None, "a search needs candidates"
    weighted = best_values * importance
    refit = (weighted * weight).sum(-1) / (weighted * best_values).sum(-1).clamp_min(1e-30)
    _, error = _rounded(weight, importance, unit_values, refit)
    return torch.where(error < best_error, refit, best)


def _rounded(
    weight: torch.Tensor,
    importance: torch.Tensor,
    unit_values: Callable[[torch.Tensor], torch.Tensor],
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values at scale 1, and the weighted squared errors per group."""
    import torch

    values = unit_values(weight * torch.where(scale == 0, 0.0, 1.0 / scale)[..., None])
    change = torch.addcmul(weight, values, scale[..., None], value=-1)
    return values, change.square_().mul_(importance).sum(-1)


def group_importance(importance: torch.Tensor | None, in_features: int, padded: int, groups: int) -> torch.Tensor:
    """`(groups, width)` float32 that sums to 1 per group: padded columns weigh nothing, groups without importance weigh
    evenly. `importance` is `(in_features,)`, or None for even weights."""
    import torch
    import torch.nn.functional as F

    if importance is None:
        importance = torch.ones(in_features)
    grouped = F.pad(importance.float().clamp_min(0), (0, padded - in_features)).view(groups, -1)
    even = F.pad(torch.ones(in_features), (0, padded - in_features)).view_as(grouped)
    total = grouped.sum(1, keepdim=True)
    return torch.where(total > 0, grouped / total.clamp_min(torch.finfo(torch.float32).tiny), even)


def root_mean_squares(weight: torch.Tensor, grid: DecodedGrid, importance: torch.Tensor | None) -> torch.Tensor:
    """Each group's root mean square, float32 `(rows, groups)`, columns weighed by `importance`: the scales of grids whose values have
    variance 1. Raises CheckpointError for values that are not finite, or beyond what the scales can hold."""
    import torch
    import torch.nn.functional as F

    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError("a weight matrix holds values that are not finite; no grid can represent them.")
    in_features = weight.shape[1]
    groups, padded = grid.num_groups(in_features), grid.padded_features(in_features)
    weighting = group_importance(importance, in_features, padded, groups)
    grouped = F.pad(weight.float(), (0, padded - in_features)).view(-1, groups, padded // groups)
    wanted = (grouped.square() * weighting).sum(-1).div_(weighting.sum(-1)).sqrt_()
    if wanted.numel() and float(wanted.max()) > grid.coding.largest:
        raise CheckpointError(
            f"a group of weights of size {float(wanted.max()):.4g} exceeds {grid.coding.largest:.4g}, the largest "
            f"scale that {grid.scales} can hold; keep this matrix in its own dtype."
        )
    return wanted
