"""The triangular factor of calibration statistics that roundings with feedback work with, damped until it exists."""

from __future__ import annotations

from typing import TYPE_CHECKING

from haversack.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch

    from haversack.parts.weights.base import WeightTask

_MAX_DAMPING = 1e4
"""Relative damping at which the matrix is diagonal for every purpose; float32 always factorises before it."""


def required_hessian(task: WeightTask) -> torch.Tensor:
    """The task's second-order statistics. Raises UsageError where it has none, CheckpointError where they aren't finite."""
    import torch

    if task.hessian is None:
        raise UsageError(
            "second-order feedback needs calibration statistics and this site has none; calibrate first, "
            "or choose nearest rounding."
        )
    if not bool(torch.isfinite(task.hessian.diagonal()).all()):
        raise CheckpointError("calibration statistics are not finite; the model overflows on the calibration text.")
    return task.hessian


def damped_factor(
    hessian: torch.Tensor, damping: float, notes: list[str], order: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """Upper triangular `R` with `R R^T = hessian[order][:, order] + added * I`, and `added`.

    `added` is `damping` times the mean diagonal, raised tenfold until the matrix factorises (noted). Workspace: two
    copies of `hessian`, float32. Raises CheckpointError for statistics that never do.
    """
    import torch

    mean = hessian.diagonal().mean().item()
    if mean <= 0:  # no token at all: every column on its own
        return torch.eye(len(hessian)), 1.0
    tried = damping
    flipped = (torch.arange(len(hessian)) if order is None else order).flip(0)
    matrix = hessian[flipped][:, flipped].float()
    diagonal = matrix.diagonal().clone()
    while tried <= _MAX_DAMPING:
        matrix.diagonal().copy_(diagonal + tried * mean)
        lower, info = torch.linalg.cholesky_ex(matrix)
        if info.item() == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            if tried > damping:
                notes.append(f"statistics not positive definite: damping raised from {damping:g} to {tried:g}")
            return lower.flip(0, 1), tried * mean
        tried *= 10
    raise CheckpointError(
        "calibration statistics can't be made positive definite; they are not finite or not symmetric."
    )
