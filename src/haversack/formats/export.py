"""Packed folders written in other tools' layouts: what all such layouts share."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from haversack.describe.assemble import piece_view
from haversack.describe.checkpoint import read_stored, torch_dtype
from haversack.describe.model import Model
from haversack.describe.site import WeightSite
from haversack.errors import OutputError
from haversack.formats.output import check_output, sync_folder
from haversack.formats.packed_folder import PackedFolder, partial_path
from haversack.formats.safetensors_file import explained
from haversack.ledger import StoredTensor
from haversack.parts.weights.base import Grid, WeightOption
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.integer import IntegerGrid

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Change:
    """One site that a layout could not say as the plan says it, and what is there instead."""

    site: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.site}: {self.was} -> {self.now}"


@dataclass(frozen=True)
class Packed:
    """A packed folder opened with the model that its config describes: options and tensors by site."""

    folder: PackedFolder
    model: Model
    config: Mapping[str, Any]

    def option(self, site: WeightSite) -> WeightOption:
        return WeightOption.from_dict(self.folder.manifest.sites[site.id].option)

    def tensors(self, site: WeightSite) -> dict[str, torch.Tensor]:
        """The site's stored tensors, read."""
        return {
            name: read_stored(tensor, [(0, n, 1) for n in tensor.shape])
            for name, tensor in self.folder.site_tensors(site.id).items()
        }

    def matrix(self, site: WeightSite) -> torch.Tensor:
        """The matrix `(out, in)` that the site's tensors stand for, in float32."""
        option = self.option(site)
        return option.dense(self.tensors(site), site.out_features, site.in_features).float()

    def rest(self, name: str) -> torch.Tensor:
        """A tensor that was never packed."""
        tensor = self.folder.rest_tensors()[name]
        return read_stored(tensor, [(0, n, 1) for n in tensor.shape])

    def shape_of(self, site: WeightSite, tensor: str) -> tuple[int, ...]:
        """The whole shape of a checkpoint tensor that a site is cut from."""
        blocks = self.model.sources[f"{site.module}.{site.parameter}"].blocks
        return next(block.source_shape for block in blocks if block.tensor == tensor)

    def dense_tensors(self, sites: Iterable[WeightSite]) -> dict[str, StoredTensor]:
        """The checkpoint's tensors that sites are cut from, whole, by their names there."""
        return {
            piece.tensor: StoredTensor(piece.tensor, site.dtype, self.shape_of(site, piece.tensor))
            for site in sites
            for piece in site.pieces
        }

    def dense_tensor(self, wanted: StoredTensor, sites: Iterable[WeightSite]) -> torch.Tensor:
        """One tensor of the checkpoint, put together from the matrices of the sites that are cut from it."""
        import torch

        whole = torch.empty(wanted.shape, dtype=torch_dtype(wanted.dtype))
        for site in sites:
            if all(piece.tensor != wanted.name for piece in site.pieces):
                continue
            matrix, first = self.matrix(site), 0
            for piece in site.pieces:
                own = piece.tensor == wanted.name
                shape = self.shape_of(site, piece.tensor)
                view = piece_view(whole if own else torch.empty(shape, device="meta"), piece)
                if own:
                    view.copy_(matrix[first : first + len(view)])
                first += len(view)
        return whole


@dataclass(frozen=True)
class Integers:
    """A matrix as integers under 16-bit scales: `(codes - zeros) * scales`, exactly.

    `codes` is uint8 `(out, in)` below `2 ** bits`, `scales` float16 and `zeros` uint8 `(out, groups)`; every group has
    `group_size` columns, the last one as many as are left. `symmetric` says that every zero is half the codes.
    """

    bits: int
    group_size: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    symmetric: bool


def integers_of(option: WeightOption, tensors: Mapping[str, torch.Tensor], in_features: int) -> Integers | None:
    """What an option stores as integers under scales, or None where it stores anything else or more."""
    import torch

    from haversack.codecs.bitpack import unpack_codes

    grid = option.grid
    if grid is None or option.transforms or option.corrections or not is_integer(grid):
        return None
    padded, groups = grid.padded_features(in_features), grid.num_groups(in_features)
    codes = unpack_codes(tensors["codes"], grid.bits, padded)[:, :in_features]
    scales = (
        tensors["scales"] if isinstance(grid, IntegerGrid) else grid.coding.unpack(tensors, slice(None), groups).half()
    )
    half = torch.full(scales.shape, 1 << (grid.bits - 1), dtype=torch.uint8)
    zeros = tensors.get("zeros", half)
    return Integers(grid.bits, grid.group_size or in_features, codes, scales, zeros, "zeros" not in tensors)


def is_integer(grid: Grid | None) -> TypeGuard[IntegerGrid | CodebookGrid]:
    """Whether a grid's values are integers an even step apart."""
    return isinstance(grid, IntegerGrid) or (isinstance(grid, CodebookGrid) and grid.values.startswith("int"))


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, `OUTPUT.partial`, which gets its name at the end and is removed if anything goes wrong.

    Raises OutputError where the output exists or another process writes it.
    """
    check_output(output)
    if output.exists():
        raise OutputError(f"{output} exists already; choose another output or remove it first.")
    partial = partial_path(output)
    with explained(output, 0, resumable=False):
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"{partial} is being written by another process; wait for it to end.") from None
            for left in partial.iterdir():  # by an export that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            try:
                yield partial
                sync_folder(partial)
                partial.rename(output)
                sync_folder(output.absolute().parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        finally:
            os.close(lock)
