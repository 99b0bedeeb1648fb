"""Codes of 1 to 8 bits cut into planes of one bit, for blocks of 16 rows: layout `planes-v1`.

A *block* is 16 rows, the last one padded with code 0; a *unit* is 32 columns, the last one padded likewise. A block holds its
units in order, a unit its planes from the lowest bit up, a plane 16 little-endian words of 32 bits:

    bit k of word r of plane p of unit u of block b   =   bit p of the code at row 16 b + r, column 32 u + k

so that one vector of 64 bytes holds the same 32 columns of 16 rows, and whatever is done to it is done to sixteen rows at
once: looking up sums of activations, or counting bits. A plane takes the same bytes whatever stands beside it, and time grows
with the number of planes.

Error: none. Memory: `ceil(rows / 16) * ceil(columns / 32) * 64 * bits` bytes, which is `bits / 8` per code where both divide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from haversack.errors import UsageError

if TYPE_CHECKING:
    import torch

LAYOUT = "planes-v1"
"""Name and version of the layout."""

BLOCK_ROWS, UNIT_COLUMNS, VECTOR_BYTES = 16, 32, 64
"""Rows of a block, columns of a unit, and bytes of one plane of both."""

MAX_PLANES = 8


def num_blocks(num_rows: int) -> int:
    return -(-num_rows // BLOCK_ROWS)


def block_bytes(num_columns: int, bits: int) -> int:
    """Bytes of sixteen rows of `num_columns` codes, padding included."""
    _check_bits(bits)
    return -(-num_columns // UNIT_COLUMNS) * VECTOR_BYTES * bits


def pack_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes `(rows, columns)` into uint8 `(num_blocks(rows), block_bytes(columns, bits))`.

    Allocates up to three bytes per code. Raises UsageError where a code needs more bits.
    """
    import torch
    import torch.nn.functional as F

    rows, columns = codes.shape
    size = block_bytes(columns, bits)
    if codes.dtype != torch.uint8:
        raise UsageError(f"codes to pack must be uint8, got {codes.dtype}")
    if bits < 8 and codes.numel() and int(codes.max()) >= 1 << bits:
        raise UsageError(f"code {int(codes.max())} does not fit in {bits} bits (at most {(1 << bits) - 1})")
    codes = F.pad(codes, (0, -columns % UNIT_COLUMNS, 0, -rows % BLOCK_ROWS))
    blocks, units = num_blocks(rows), codes.shape[1] // UNIT_COLUMNS
    eights = codes.view(blocks, BLOCK_ROWS, units, 4, 8)  # the last axis is the bits of a byte
    packed = codes.new_empty(blocks, units, bits, BLOCK_ROWS, 4)
    for plane in range(bits):
        byte = torch.zeros(eights.shape[:-1], dtype=torch.uint8, device=codes.device)
        for k in range(8):
            byte |= (eights[..., k] >> plane & 1) << k
        packed[:, :, plane] = byte.transpose(1, 2)
    return packed.view(blocks, size)


def unpack_rows(packed: torch.Tensor, index: torch.Tensor, bits: int, num_columns: int) -> torch.Tensor:
    """Codes, uint8 `(len(index), num_columns)`, of some rows of packed blocks: the inverse of `pack_planes`.

    Allocates up to `UNPACK_BYTES_PER_CODE` bytes per code (of whole units), its result included.
    """
    import torch

    size = block_bytes(num_columns, bits)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != size:
        raise UsageError(
            f"{num_columns} columns of {bits} bit planes are packed as uint8 (blocks, {size}), "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    num_units = -(-num_columns // UNIT_COLUMNS)
    blocks = packed.view(packed.shape[0], num_units, bits, BLOCK_ROWS, 4)
    units = blocks[index // BLOCK_ROWS, :, :, index % BLOCK_ROWS]  # (rows, units, planes, bytes)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    codes = packed.new_zeros(len(index), num_units, 4, 8)
    for plane in range(bits):
        codes |= (units[:, :, plane].unsqueeze(-1) >> shifts).bitwise_and_(1).bitwise_left_shift_(plane)
    return codes.view(len(index), num_units * UNIT_COLUMNS)[:, :num_columns]


UNPACK_BYTES_PER_CODE = 3
"""Most bytes per (padded) code that `unpack_rows` allocates at one time, its result included."""


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_PLANES:
        raise UsageError(f"codes of {bits} bits can't be cut into planes; layout {LAYOUT} holds 1 to {MAX_PLANES}")
