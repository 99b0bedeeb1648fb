"""Tracing without values: each number that code reads from a tensor is true, so that it takes the way of real data without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class TrueValues(TorchDispatchMode):
    """Answers 1 (true) wherever a number is read from a tensor, and the shape of a grouped product that torch's own tracing
    refuses."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float32:
            return _grouped_product(*args[:3])  # the CPU computes it, but torch's fake refuses all but bfloat16
        return func(*args, **(kwargs or {}))


def _grouped_product(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """What `_grouped_mm` makes of rows by expert: `(m, n)` with stacked matrices, `(experts, m, n)` of two flat ones."""
    if a.ndim == 2 and b.ndim == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    assert a.ndim == b.ndim == 2, "rows by expert times matrices, or times rows by expert"
    return a.new_empty(ends.shape[0], a.shape[0], b.shape[1])
