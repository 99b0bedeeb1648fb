"""Activations rounded to int8 per group of columns, as values: for kernels that multiply floats.

Kernels with int8 dot products do the same rounding inside; this keeps `activation_bits=8` the same computation on
machines that have none. Error: half of scale = max |x| / 127 of the group, per activation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from haversack.kernels.format import WHOLE_ROW, PackedFormat, PlaneFormat


def rounded_activations(x: torch.Tensor, fmt: PackedFormat | PlaneFormat) -> torch.Tensor:
    """`(tokens, in)` float32: each group of columns rounded to 255 levels."""
    group_size = fmt.in_features if fmt.group_size == WHOLE_ROW else fmt.group_size
    padded = F.pad(x.float(), (0, fmt.padded_columns - fmt.in_features))
    groups = padded.view(x.shape[0], -1, group_size)
    scale = groups.abs().amax(dim=-1, keepdim=True).div_(127)
    levels = (groups / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    return levels.mul_(scale).view(x.shape[0], -1)[:, : fmt.in_features]


def rounding_bytes(fmt: PackedFormat | PlaneFormat, num_tokens: int) -> int:
    """The most bytes `rounded_activations` holds at one time, its result included."""
    return num_tokens * (4 * fmt.in_features + 3 * 4 * fmt.padded_columns + 8 * fmt.num_groups)
