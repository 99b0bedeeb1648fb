"""A tensor that a checkpoint stores as several others (codes, scales, blocks), seen as the 16-bit tensor that they stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from haversack.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from haversack.describe.checkpoint import CheckpointTensor

Range = tuple[int, int, int]
"""(start, stop, step) of one axis."""

Read = Callable[["CheckpointTensor", Sequence[Range]], "torch.Tensor"]
"""Reads a region of a stored tensor as it lies in its file."""


GROUP_SIZES, SMALL_GROUP_SIZES = (64, 128), (16, 32)
"""Columns per group that the kernels for integers have (`parts/weights/integer.py`), and those that only symmetric codes of 2 to 4
bits can have, as tables (`parts/weights/codebook.py`)."""


@dataclass(frozen=True)
class StoredForm(ABC):
    """How one tensor is stored. `parts` are the tensors that hold it, all their bytes counted; `title` says it in a few words."""

    parts: Mapping[str, CheckpointTensor]
    title: str

    @abstractmethod
    def region(self, ranges: Sequence[Range], read: Read) -> torch.Tensor:
        """`tensor[start:stop:step, ...]`, one range per axis, in float32 or as exact as the form is."""

    def codes(self, rows: Range, read: Read) -> StoredCodes | None:
        """Some rows as integers under scales, where that is what is stored."""
        return None

    def grid(self, rows: Range, read: Read) -> StoredGrid | None:
        """The grid that some rows' integers lie on, from scales and zero points alone."""
        return None


@dataclass(frozen=True)
class StoredGrid:
    """Integers of `bits` in groups of `group_size` columns (0: a whole row); symmetric: every zero point is half the codes."""

    bits: int
    group_size: int
    symmetric: bool


@dataclass(frozen=True)
class StoredCodes:
    """Rows that a checkpoint stores as integers: `(codes - zeros) * scales`.

    `codes` is uint8 `(rows, columns)`, `scales` float32 and `zeros` int32 `(rows, groups)`. Column c belongs to group
    `groups[c]`, or to `c // (columns / groups)` where that is None.
    """

    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    groups: torch.Tensor | None = None

    def values(self) -> torch.Tensor:
        """What they stand for, float32 `(rows, columns)`."""
        columns, num_groups = self.codes.shape[1], self.scales.shape[1]
        if self.groups is None:
            grouped = self.codes.unflatten(1, (num_groups, columns // num_groups)).float()
            return grouped.sub_(self.zeros.unsqueeze(-1)).mul_(self.scales.unsqueeze(-1)).flatten(1)
        return self.codes.float().sub_(self.zeros[:, self.groups]).mul_(self.scales[:, self.groups])

    def grid(self) -> StoredGrid | None:
        """The grid as kernels know it, or None: groups out of order, scales beyond float16, zero points that are no codes."""
        return _grid_of(self.bits, self.codes.shape[1], self.scales, self.zeros, self.groups)


class IntegerForm(StoredForm):
    """A form of integers under scales: says its codes, and scales and zero points apart from them; the rest follows."""

    bits: int
    columns: int

    @abstractmethod
    def read_codes(self, start: int, stop: int, read: Read) -> torch.Tensor:
        """uint8 `(stop - start, columns)`."""

    @abstractmethod
    def read_scales(self, start: int, stop: int, read: Read) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """float32 scales and int32 zeros `(stop - start, groups)`, and each column's group where groups are out of order."""

    def region(self, ranges: Sequence[Range], read: Read) -> torch.Tensor:
        rows, columns = ranges
        return self.codes(rows, read).values()[:, slice(*columns)]

    def codes(self, rows: Range, read: Read) -> StoredCodes:
        start, stop, step = rows
        codes = self.read_codes(start, stop, read)
        scales, zeros, groups = self.read_scales(start, stop, read)
        return StoredCodes(self.bits, codes[::step], scales[::step], zeros[::step], groups)

    def grid(self, rows: Range, read: Read) -> StoredGrid | None:
        scales, zeros, groups = self.read_scales(rows[0], rows[1], read)
        return _grid_of(self.bits, self.columns, scales[:: rows[2]], zeros[:: rows[2]], groups)


def group_order(index: torch.Tensor, num_groups: int) -> torch.Tensor | None:
    """Each column's group as int64, or None where groups are runs of equal length in order. CheckpointError for a group
    that there is not."""
    import torch

    if len(index) and not (int(index.min()) >= 0 and int(index.max()) < num_groups):
        raise CheckpointError(
            f"a column belongs to group {int(index.max())}, where groups go from 0 to {num_groups - 1}; the checkpoint is "
            "damaged: download it again."
        )
    width, rest = divmod(len(index), num_groups)
    plain = torch.arange(len(index), dtype=index.dtype) // max(1, width)
    return None if rest == 0 and torch.equal(index, plain) else index.long()


def _grid_of(
    bits: int, columns: int, scales: torch.Tensor, zeros: torch.Tensor, groups: torch.Tensor | None
) -> StoredGrid | None:
    import torch

    width, rest = divmod(columns, max(1, scales.shape[1]))
    if groups is not None or rest or bits not in (2, 3, 4, 8) or not torch.equal(scales.half().float(), scales):
        return None
    symmetric = bool((zeros == 1 << (bits - 1)).all())
    if width in SMALL_GROUP_SIZES and symmetric and bits <= 4:
        return StoredGrid(bits, width, True)
    group_size = 0 if width == columns and width not in GROUP_SIZES and bits == 8 else width
    if group_size not in (*GROUP_SIZES, 0) or not (symmetric or bool((zeros >= 0).all() and (zeros < 1 << bits).all())):
        return None
    return StoredGrid(bits, group_size, symmetric)
