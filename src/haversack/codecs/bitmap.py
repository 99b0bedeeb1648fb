"""One bit per column: bit i of byte j is column 8 j + i, rows padded to whole bytes with zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """uint8 `(rows, ceil(columns / 8))` of booleans `(rows, columns)`."""
    import torch
    import torch.nn.functional as F

    grouped = F.pad(bits.byte(), (0, -bits.shape[1] % 8)).view(len(bits), -1, 8)
    return (grouped << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """uint8 `(rows, columns)`, 0 or 1."""
    import torch

    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> shifts).bitwise_and_(1).flatten(1)[:, :columns]
