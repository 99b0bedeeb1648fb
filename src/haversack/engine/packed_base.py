"""A packed folder as a frozen base to tune beside: its kernels multiply forwards, and gradients pass back through tiles of its rows.

The matrices stay as they were packed, in whatever form each site has; neither pass holds a whole one unpacked. Source: Dettmers et al. 2023, arXiv
2305.14314, section 3 (a quantized base with low-rank adapters); here the base is any plan's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from haversack.describe.model import Model
from haversack.engine.generation import uninstall_kv_plan
from haversack.engine.load import PackedModel, open_packed
from haversack.engine.packed_tensor import PackedMatrix, RowBlock, packed_parameters
from haversack.errors import UsageError

TILE_ELEMENTS = 2**20
"""Elements of a matrix that the backward pass unpacks at a time."""


class FrozenMatrix(PackedMatrix):
    """A packed matrix whose product has a gradient with respect to its input: `grad W`, tile by tile of `W`'s rows."""

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _FrozenProduct.apply(x, self) if x.requires_grad else super().linear(x)

    def input_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """`(..., out_features)` -> `(..., in_features)`, summed in 32 bits."""
        flat = grad.reshape(-1, self.out_features)
        total = torch.zeros(len(flat), self.in_features, dtype=torch.float32, device=grad.device)
        rows = max(1, TILE_ELEMENTS // self.in_features)
        for start in range(0, self.out_features, rows):
            index = torch.arange(start, min(start + rows, self.out_features), device=grad.device)
            total += (flat[:, index[0] : index[-1] + 1] @ self.rows(index, grad.dtype)).float()
        return total.to(grad.dtype).reshape(*grad.shape[:-1], self.in_features)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: FrozenMatrix) -> torch.Tensor:
        ctx.matrix = matrix
        return PackedMatrix.linear(matrix, x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return ctx.matrix.input_gradient(grad), None


def describe_packed_base(folder: Path) -> tuple[Model, dict[str, int]]:
    """The unpacked model that a packed folder stands for, with the folder as its own, and the bytes that its weights hold by owner. Raises
    UsageError for a folder whose layers are streamed: a backward pass would read them in the other direction."""
    packed = open_packed(folder)
    streamed = [site.id for site in packed.described.weights if packed.placement(site.id) == "streamed"]
    if streamed:
        raise UsageError(
            f"{folder} streams {len(streamed)} matrices from disk, which can't be tuned beside; pack it with --placement resident."
        )
    sites = sum(
        tensor.num_bytes
        for site in packed.described.weights
        if packed.placement(site.id) == "resident"
        for tensor in packed.folder.site_tensors(site.id).values()
    )
    rest = sum(tensor.num_bytes for tensor in packed.folder.rest_tensors().values())
    return dataclasses.replace(packed.described, folder=folder), {"packed weights": sites, "weights": rest}


def freeze_packed(model: Any, attention: str) -> None:
    """Make a loaded packed model one that gradients pass through: its planned cache is taken off, transformers' attention put back."""
    assert isinstance(model.haversack, PackedModel), "loaded from a packed folder"
    uninstall_kv_plan(model, attention)
    for parameter in packed_parameters(model):
        parameter.blocks = tuple(RowBlock(_frozen(block.matrix), block.rows) for block in parameter.blocks)


def _frozen(matrix: PackedMatrix) -> FrozenMatrix:
    return FrozenMatrix(**{f.name: getattr(matrix, f.name) for f in dataclasses.fields(matrix)})
