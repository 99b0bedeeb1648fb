"""Scales of the inputs: columns are multiplied by them before they are represented, and inputs divided at run time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from haversack.errors import UsageError
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.weights.base import Grid, Transform, WeightTask

if TYPE_CHECKING:
    import torch


class InputScale(Transform):
    """What all parts that scale inputs share: one float16 per column is stored, what its inputs are multiplied by."""

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        return (StoredTensor("inverse", "F16", (in_features,)),)

    def apply(self, task: WeightTask, grid: Grid) -> dict[str, torch.Tensor]:
        if task.hessian is None:
            raise UsageError(
                f"{self.id}: scales follow calibration statistics and this site has none; calibrate first."
            )
        inverse = self.inverse(task.weight, task.hessian, grid)
        factor = inverse.float()
        task.weight = task.weight / factor
        task.hessian = factor[:, None] * task.hessian * factor
        return {"inverse": inverse}

    @abstractmethod
    def inverse(self, weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
        """What inputs are multiplied by, float16 `(in,)`."""

    def transform_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return x * tensors["inverse"].to(x.dtype)

    def restore_rows(self, rows: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return rows * tensors["inverse"].float()

    def workspace_bytes(self, num_tokens: int, in_features: int, dtype: str) -> int:
        """The scaled input, and the scales in its dtype."""
        return (num_tokens + 1) * in_features * DTYPE_BYTES[dtype]


def around_one(scale: torch.Tensor) -> torch.Tensor:
    """One over positive scales, float16: around 1, so that neither weights nor inputs overflow."""
    middle = (scale.max() * scale.min()).sqrt()
    return (middle / scale).clamp(2.0**-14, 2.0**14).half()
