"""One matrix, or one module's parameter, made from a checkpoint's bytes and from nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from haversack.describe.checkpoint import Checkpoint, read_stored, torch_dtype
from haversack.describe.model import Model
from haversack.describe.site import TensorSlice, WeightSite
from haversack.describe.stored_form import Range, StoredCodes, StoredForm, StoredGrid
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


def piece_view(whole: torch.Tensor, piece: TensorSlice) -> torch.Tensor:
    """The rows `(n, in_features)` that a piece cuts from its whole checkpoint tensor, as a view that can be written to."""
    view = whole
    for axis, (start, stop) in enumerate(piece.index):
        view = view.narrow(axis, start, stop - start)
    if piece.squeeze:
        view = view.squeeze(0)
    if piece.transposed:
        view = view.transpose(0, 1)
    return view[:: piece.row_step]


def read_codes(checkpoint: Checkpoint, site: WeightSite) -> StoredCodes | None:
    """The site's integers, scales and zero points as the checkpoint stores them; None where it stores anything else."""
    import torch

    found: list[StoredCodes] = []
    for piece in site.pieces:
        form, rows = _integer_rows(checkpoint, piece)
        codes = None if form is None else form.codes(rows, read_stored)
        if codes is None or (
            found and (codes.bits, codes.scales.shape[1]) != (found[0].bits, found[0].scales.shape[1])
        ):
            return None
        found.append(codes)
    if len(found) == 1:
        return found[0]
    if any(codes.groups is not None for codes in found):
        return None
    whole = (torch.cat([getattr(codes, name) for codes in found]) for name in ("codes", "scales", "zeros"))
    return StoredCodes(found[0].bits, *whole)


def stored_grid(checkpoint: Checkpoint, site: WeightSite) -> StoredGrid | None:
    """The grid that the site's stored integers lie on, in the kernels' words; None where there is none. Reads scales and
    zero points, no codes."""
    grids = set()
    for piece in site.pieces:
        form, rows = _integer_rows(checkpoint, piece)
        grids.add(None if form is None else form.grid(rows, read_stored))
    return grids.pop() if len(grids) == 1 else None


def _integer_rows(checkpoint: Checkpoint, piece: TensorSlice) -> tuple[StoredForm | None, Range]:
    """The form that a piece is cut from, and which of its rows; no form where the piece is no run of whole rows."""
    tensor = checkpoint[piece.tensor]
    if tensor.form is None or len(tensor.shape) != 2 or piece.transposed or piece.squeeze or len(piece.index) > 1:
        return None, (0, 0, 1)
    start, stop = piece.index[0] if piece.index else (0, tensor.shape[0])
    return tensor.form, (start, stop, piece.row_step)


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
