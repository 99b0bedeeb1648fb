"""As stored: the codes, scales and zero points that a quantized checkpoint holds, bit for bit, on the grid they lie on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.errors import CheckpointError
from haversack.parts.weights.base import Grid, Rounding, WeightTask

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AsStored(Rounding):
    """The checkpoint's own codes; nothing is rounded again, no bytes of its own.

    For matrices that a checkpoint stores as integers under scales that float16 holds: in groups of 64 or 128 columns (or rows, at
    8 bits), or symmetric ones of 2 to 4 bits in groups of 16 or 32. Error: none against the checkpoint; the 16-bit matrix that it stands for is rounded where this is not.
    """

    id: ClassVar[str] = "as-stored"
    title: ClassVar[str] = "codes as the checkpoint stores them"
    lossless: ClassVar[bool] = True

    def round(self, task: WeightTask, grid: Grid) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        import torch

        stored = task.stored
        if stored is None or stored.grid() is None:
            raise CheckpointError(
                "this matrix is to be kept as the checkpoint stores it, but the checkpoint stores it in another form; make a "
                "new plan."
            )
        scales = {"scales": stored.scales.to(torch.float16)}
        fields = grid.to_dict()
        if not fields.get("symmetric", True):
            scales["zeros"] = stored.zeros.to(torch.uint8)
        return stored.codes, scales
