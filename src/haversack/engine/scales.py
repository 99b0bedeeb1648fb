"""Trained scales: a base of 4-bit integers whose codes stay as they are, and whose scales alone are tuned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from haversack.codecs.bitpack import unpack_codes
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.model import Model
from haversack.engine.adapters import BASE_GRID, UNPACK_ELEMENTS, PackedLinear, adapt
from haversack.errors import CheckpointError
from haversack.formats.output import write_whole
from haversack.formats.safetensors_file import write_tensors

CONFIG_NAME, WEIGHTS_NAME = "scales_config.json", "scales.safetensors"


class TrainedScales(nn.Module):
    """`y = x W^T` where `W` `(out, in)` is `scale * code`, with a trained scale per row and group of columns and frozen integer codes.

    Trains `out * in / group_size` numbers, which may be kept in more bits than activations have. Of the inputs, all are kept for the backward
    pass, as beside adapters. Differs from the source in that the grid is symmetric (no zero points) with groups of `BASE_GRID`. Source: Kim et al. 2023, arXiv
    2305.14152, equation 2.
    """

    codes: torch.Tensor

    def __init__(self, base: PackedLinear, out_features: int, in_features: int, rank: int, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("codes", base.codes)
        self.scales = nn.Parameter(base.scales.to(dtype))
        self.in_features, self.bias = in_features, base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _ScaledProduct.apply(x, self.scales, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def tiles(self) -> list[slice]:
        """Rows of at most `UNPACK_ELEMENTS` elements each."""
        rows = max(1, UNPACK_ELEMENTS // self.in_features)
        return [slice(start, min(start + rows, len(self.codes))) for start in range(0, len(self.codes), rows)]

    def integers(self, rows: slice) -> torch.Tensor:
        """What codes of some rows stand for at scale 1, float32 `(rows, groups, group_size)`; padded columns are 0."""
        groups = self.scales.shape[1]
        codes = unpack_codes(self.codes[rows], BASE_GRID.bits, groups * BASE_GRID.group_size)
        return codes.float().sub_(2 ** (BASE_GRID.bits - 1)).view(len(codes), groups, BASE_GRID.group_size)

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix `(out, in)`."""
        weight = torch.empty(len(self.codes), self.in_features, dtype=dtype, device=self.codes.device)
        for rows in self.tiles():
            values = self.integers(rows).mul_(self.scales.detach()[rows, :, None].float())
            weight[rows] = values.flatten(1)[:, : self.in_features]
        return weight


class _ScaledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scales: torch.Tensor, module: TrainedScales) -> torch.Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return F.linear(x, module.unpack(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        (grad,), (x,) = grads, ctx.saved_tensors
        module: TrainedScales = ctx.module
        flat, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        trained = torch.empty_like(module.scales)
        for rows in module.tiles():
            own = (flat[:, rows].T @ inputs).float()  # the gradient of some rows of the matrix
            integers = module.integers(rows)
            padded = F.pad(own, (0, integers[0].numel() - own.shape[1]))
            trained[rows] = integers.mul_(padded.view_as(integers)).sum(-1)
        back = grad @ module.unpack(grad.dtype) if ctx.needs_input_grad[0] else None
        return back, trained, None


def scales_of(model: nn.Module) -> dict[str, TrainedScales]:
    """Name of the linear -> its trained scales."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainedScales)}


def save_scales(model: nn.Module, folder: Path, base_model: str, targets: str) -> None:
    """Write a model's scales, and what they are scales of; one tensor at a time."""
    tensors = {f"{name}.scales": module.scales for name, module in scales_of(model).items()}
    grid = {"bits": BASE_GRID.bits, "group_size": BASE_GRID.group_size}
    config = {"base_model": base_model, "targets": targets, "grid": grid, "num_tensors": len(tensors)}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    write_whole(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def load_scales(model: Any, described: Model, folder: Path) -> None:
    """Pack a loaded model's linears as they were tuned and put the scales in, so that it answers with them; once packed, a model takes other
    scales of the same base. Raises CheckpointError where they are of another grid or a model of another shape."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        targets, grid = config["targets"], (config["grid"]["bits"], config["grid"]["group_size"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder} has no readable {CONFIG_NAME} of trained scales.") from None
    if grid != (BASE_GRID.bits, BASE_GRID.group_size):
        raise CheckpointError(
            f"{folder} holds scales of the grid {grid}, which is not this version's; tune them again."
        )
    tensors = Checkpoint.open(folder)
    if not scales_of(model):
        dtype = tensors.read(next(iter(tensors.tensors))).dtype
        adapt(model, described, rank=1, targets=targets, packed=True, dtype=dtype, kind=TrainedScales)
    own = {f"{name}.scales": module.scales for name, module in scales_of(model).items()}
    if {name: tuple(p.shape) for name, p in own.items()} != {name: t.shape for name, t in tensors.tensors.items()}:
        raise CheckpointError(f"{folder} holds scales of a model of another shape; name the one they were tuned in.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors.read(name))
