"""How a packed matrix is laid out: what every kernel needs to know besides the tensors. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from haversack.codecs.bitpack import PACKED_BITS, UNIT_COLUMNS, packed_row_bytes
from haversack.errors import UsageError

WHOLE_ROW = 0
"""`group_size` of a matrix with one scale per row."""


@dataclass(frozen=True)
class PackedFormat:
    """A matrix of integer codes in layout `rows-v1` with one float16 scale per group of columns.

    The value of code q is `(q - 2^(bits-1)) * scale` when symmetric, else `(q - zero) * scale` with a uint8 zero per
    group. Columns are padded to whole groups before they are packed; padding columns are never read as values.
    """

    bits: int
    group_size: int
    in_features: int
    symmetric: bool

    def __post_init__(self) -> None:
        if self.bits not in PACKED_BITS:
            raise UsageError(f"packed matrices have {PACKED_BITS} bits per code, asked for {self.bits}")
        if self.in_features < 1:
            raise UsageError(f"a packed matrix needs at least one column, asked for {self.in_features}")
        if self.group_size < 0:
            raise UsageError(f"group_size is a number of columns, or 0 for whole rows, asked for {self.group_size}")

    @property
    def padded_columns(self) -> int:
        """Columns that are packed: whole groups (for whole rows, the columns there are)."""
        if self.group_size == WHOLE_ROW:
            return self.in_features
        return -(-self.in_features // self.group_size) * self.group_size

    @property
    def num_groups(self) -> int:
        return 1 if self.group_size == WHOLE_ROW else self.padded_columns // self.group_size

    @property
    def unit_columns(self) -> int:
        """Columns with the padding to whole units of the layout."""
        return -(-self.padded_columns // UNIT_COLUMNS) * UNIT_COLUMNS

    @property
    def row_bytes(self) -> int:
        return packed_row_bytes(self.padded_columns, self.bits)
