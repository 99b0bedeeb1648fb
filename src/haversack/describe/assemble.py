"""One matrix, or one module's parameter, made from a checkpoint's bytes and from nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from haversack.describe.checkpoint import Checkpoint, torch_dtype
from haversack.describe.model import Model
from haversack.describe.site import WeightSite
from haversack.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def read_site(checkpoint: Checkpoint, site: WeightSite, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The site's matrix `(out_features, in_features)`, contiguous, in its own dtype or in `dtype`.

    Holds the matrix and at most one piece's byte range at a time.
    """
    import torch

    if len(site.pieces) == 1:
        matrix = checkpoint.read(site.pieces[0], dtype)
    else:
        matrix = torch.empty(site.out_features, site.in_features, dtype=dtype or torch_dtype(site.dtype))
        row = 0
        for piece in site.pieces:
            rows = checkpoint.read(piece, dtype)
            matrix[row : row + rows.shape[0]] = rows
            row += rows.shape[0]
    if matrix.shape != (site.out_features, site.in_features):
        raise CheckpointError(
            f"Site {site.id!r} is {site.out_features} x {site.in_features}, but the checkpoint in "
            f"{str(checkpoint.folder)!r} holds {list(matrix.shape)} there; it belongs to another model."
        )
    return matrix


def read_parameter(
    checkpoint: Checkpoint, model: Model, module: str, parameter: str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`module.parameter` as `from_pretrained` would load it, bit for bit, in the checkpoint's dtype or in `dtype`."""
    import torch

    name = f"{module}.{parameter}" if module else parameter
    source = model.sources.get(name)
    if source is None:
        source = next((model.sources[kept] for kept, others in model.tied.items() if name in others), None)
    if source is None:
        raise CheckpointError(f"{model.name!r} has no parameter {name!r}; its parameters are in `Model.sources`.")
    own_dtype = torch_dtype(checkpoint[source.blocks[0].tensor].dtype)
    result = torch.empty(source.shape, dtype=dtype or own_dtype)
    for block in source.blocks:
        region = checkpoint.read_region(block.tensor, block.region())
        # Axes of the tensor that no axis of the layout shows have length one; drop them, then put the others in order.
        shown = [axis for axis in block.axes if axis is not None]
        values = region.permute(*shown, *(i for i in range(region.ndim) if i not in shown)).reshape(block.shape)
        result[tuple(slice(at, at + length) for at, length in zip(block.at, block.shape, strict=True))] = values
    return result
