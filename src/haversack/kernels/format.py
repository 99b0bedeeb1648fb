"""How packed matrices and matrices of bit planes are laid out: what kernels need to know besides the tensors. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from haversack.codecs import bitplanes
from haversack.codecs.bitpack import PACKED_BITS, UNIT_COLUMNS, packed_row_bytes
from haversack.errors import UsageError

WHOLE_ROW = 0
"""`group_size` of a matrix with one scale per row."""

MAX_TABLE = 16
"""Values of a table that kernels hold in registers: 4 bits."""

SCALE_BYTES = {"f16": 2, "e8m0": 1}
"""How scales are stored, and the bytes of one."""


@dataclass(frozen=True)
class PackedFormat:
    """A matrix of codes in layout `rows-v1` with one scale per group of columns.

    The value of code q is `(q - 2^(bits-1)) * scale` when symmetric, else `(q - zero) * scale` with a uint8 zero per
    group; or, with a `table` of 2^bits values, `table[q] * scale`. `scales` says how scales are stored: "f16", or
    "e8m0", a byte e for 2^(e - 127), 0 for 0. Columns are padded to whole groups before they are packed; padding columns
    are never read as values.
    """

    bits: int
    group_size: int
    in_features: int
    symmetric: bool
    table: tuple[float, ...] | None = None
    scales: str = "f16"

    def __post_init__(self) -> None:
        if self.bits not in PACKED_BITS:
            raise UsageError(f"packed matrices have {PACKED_BITS} bits per code, asked for {self.bits}")
        if self.in_features < 1:
            raise UsageError(f"a packed matrix needs at least one column, asked for {self.in_features}")
        if self.group_size < 0:
            raise UsageError(f"group_size is a number of columns, or 0 for whole rows, asked for {self.group_size}")

        if self.scales not in SCALE_BYTES:
            raise UsageError(f"scales of packed matrices are {' or '.join(SCALE_BYTES)}, asked for {self.scales!r}")
        if self.table is not None:
            if self.bits > 4 or len(self.table) != 1 << self.bits or not all(map(math.isfinite, self.table)):
                raise UsageError(
                    f"a table holds 2^bits finite values for 2 to 4 bits, got {len(self.table)} for {self.bits} bits"
                )
            if not self.symmetric:
                raise UsageError("a table of values has no zero points beside it")

    @cached_property
    def padded_columns(self) -> int:
        """Columns that are packed: whole groups (for whole rows, the columns there are)."""
        if self.group_size == WHOLE_ROW:
            return self.in_features
        return -(-self.in_features // self.group_size) * self.group_size

    @cached_property
    def num_groups(self) -> int:
        return 1 if self.group_size == WHOLE_ROW else self.padded_columns // self.group_size

    @cached_property
    def unit_columns(self) -> int:
        """Columns with the padding to whole units of the layout."""
        return -(-self.padded_columns // UNIT_COLUMNS) * UNIT_COLUMNS

    @cached_property
    def row_bytes(self) -> int:
        return packed_row_bytes(self.padded_columns, self.bits)

    @cached_property
    def scale_row_bytes(self) -> int:
        return SCALE_BYTES[self.scales] * self.num_groups


PLANE_GROUP_SIZES = (32, 64, 128)
"""Columns of a group of bit planes: whole units."""


@dataclass(frozen=True)
class PlaneFormat:
    """A matrix of signs in planes, in layout `planes-v1`: bit 1 of a plane stands for +1, bit 0 for -1.

    The value of a weight is the sum over its planes of sign times scale. With `bases`, every plane of a group has a scale of
    its own; without, plane p of a group has 2^p times the group's one, which makes code q stand for `(2 q - (2^bits - 1)) *
    scale`. Scales are float16 `(blocks, groups, 1 or bits, 16)`: those of sixteen rows side by side.
    """

    bits: int
    group_size: int
    in_features: int
    bases: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= bitplanes.MAX_PLANES:
            raise UsageError(f"matrices of bit planes have 1 to {bitplanes.MAX_PLANES} of them, asked for {self.bits}")
        if self.in_features < 1:
            raise UsageError(f"a matrix of bit planes needs at least one column, asked for {self.in_features}")
        if self.group_size not in PLANE_GROUP_SIZES:
            sizes = ", ".join(map(str, PLANE_GROUP_SIZES))
            raise UsageError(f"groups of bit planes have one of {sizes} columns, asked for {self.group_size}")

    @cached_property
    def num_groups(self) -> int:
        return -(-self.in_features // self.group_size)

    @cached_property
    def padded_columns(self) -> int:
        return self.num_groups * self.group_size

    @property
    def group_units(self) -> int:
        return self.group_size // bitplanes.UNIT_COLUMNS

    @cached_property
    def block_bytes(self) -> int:
        return bitplanes.block_bytes(self.padded_columns, self.bits)

    @property
    def scales_per_group(self) -> int:
        return self.bits if self.bases else 1

    @property
    def scale_block_bytes(self) -> int:
        return 2 * bitplanes.BLOCK_ROWS * self.num_groups * self.scales_per_group
