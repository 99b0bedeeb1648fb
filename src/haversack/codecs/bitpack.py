"""Codes of 2, 3, 4 or 8 bits packed along the rows of a matrix: layout `rows-v1`.

A row is contiguous, so that rows can be mapped, gathered and cut between threads. Its columns are padded with code 0 to
whole *units* of 64 columns, and a unit of `b` bits takes exactly `8 b` bytes:

    bits p*b ... p*b + b - 1 of byte j of a unit   =   column p * 8b + j,     p = 0 ... 8/b - 1,  j = 0 ... 8b - 1

that is, a unit holds 8/b *planes* of 8b consecutive columns. One shift and one mask turn a whole vector of bytes into
codes, whatever the vector's width, and every lane of a vector belongs to one unit, so that scales apply lane by lane:
with 4 bits a 64-byte vector is 2 units (128 columns), with 2 bits it is 4 units (256 columns).

Three bits don't divide a byte. A row of 3-bit codes is the row of its two low bits in the 2-bit layout, followed by the
row of its high bit in the 1-bit layout (a unit is 8 bytes; bit p of byte j is column 8p + j).

Error: none, packing is exact. Memory of a row: `ceil(columns / 64) * 8 * bits` bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from haversack.errors import UsageError

if TYPE_CHECKING:
    import torch

LAYOUT = "rows-v1"
"""Name and version of the layout, written beside the tensors that use it."""

UNIT_COLUMNS = 64
"""Columns per unit: the largest number that divides the group sizes in use (64 and 128)."""

PACKED_BITS = (2, 3, 4, 8)
"""Widths that can be packed."""


def packed_row_bytes(num_columns: int, bits: int) -> int:
    """Bytes of one packed row of `num_columns` codes, padding to whole units included."""
    _check_bits(bits)
    return -(-num_columns // UNIT_COLUMNS) * 8 * bits


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes `(rows, columns)` into uint8 `(rows, packed_row_bytes(columns, bits))`.

    Works on any device and allocates up to three bytes per code. Raises UsageError where a code needs more bits.
    """
    import torch
    import torch.nn.functional as F

    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise UsageError(
            f"codes to pack must be uint8 of shape (rows, columns), got {codes.dtype} {tuple(codes.shape)}"
        )
    if bits < 8 and codes.numel() and int(codes.max()) >= 1 << bits:
        raise UsageError(f"code {int(codes.max())} does not fit in {bits} bits (at most {(1 << bits) - 1})")
    codes = F.pad(codes, (0, -codes.shape[1] % UNIT_COLUMNS))
    if bits == 3:
        return torch.cat([_pack_planes(codes & 3, 2), _pack_planes(codes >> 2, 1)], dim=1)
    return _pack_planes(codes, bits)


def unpack_codes(packed: torch.Tensor, bits: int, num_columns: int) -> torch.Tensor:
    """Codes, uint8 `(rows, num_columns)`, of packed rows; the inverse of `pack_codes`.

    Allocates up to three bytes per code and returns one of them: see `UNPACK_BYTES_PER_CODE`.
    """
    import torch

    row_bytes = packed_row_bytes(num_columns, bits)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != row_bytes:
        raise UsageError(
            f"{num_columns} columns of {bits} bits are packed as uint8 (rows, {row_bytes}), "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    if bits == 3:
        low_bytes = packed_row_bytes(num_columns, 2)
        codes = _unpack_planes(packed[:, low_bytes:], 1).bitwise_left_shift_(2)
        codes |= _unpack_planes(packed[:, :low_bytes], 2)
    else:
        codes = _unpack_planes(packed, bits)
    return codes[:, :num_columns]


UNPACK_BYTES_PER_CODE = 3
"""Most bytes per (padded) code that `unpack_codes` has allocated at one time, its result included."""


def _pack_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    rows, columns = codes.shape
    planes = codes.reshape(rows, columns // UNIT_COLUMNS, 8 // bits, 8 * bits)  # (rows, units, planes, width)
    packed = planes[:, :, 0].clone()
    for p in range(1, 8 // bits):
        packed |= planes[:, :, p] << (p * bits)
    return packed.reshape(rows, columns * bits // 8)


def _unpack_planes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    import torch

    rows, num_bytes = packed.shape
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    units = packed.reshape(rows, num_bytes // (8 * bits), 1, 8 * bits)
    planes = units >> shifts[:, None]  # (rows, units, planes, width)
    if bits < 8:
        planes &= (1 << bits) - 1
    return planes.reshape(rows, num_bytes * 8 // bits)


def _check_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise UsageError(f"codes of {bits} bits can't be packed; layout {LAYOUT} holds {PACKED_BITS} bits")
