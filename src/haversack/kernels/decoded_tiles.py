"""Products with any stored form that can be decoded by rows: decode a tile of rows in float32, multiply, next tile.

What `kernels/generic.py` is for integer codes, for every other grid: it runs everywhere, never holds the whole matrix, and
is what faster kernels of a form are checked against. Error against float64: that of a float32 matmul over `in_features`
columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NAME = "decoded-f32-tiles"

TILE_BYTES = 4 << 20
"""Bytes of one tile while it is decoded, as in the generic kernel."""


SECONDS_PER_WEIGHT = 2e-8
"""Of one thread, from table lookups of 16 million trellis codes on a busy Zen 5: 18 ns."""


def tile_rows(decode_row_bytes: int, row_multiple: int = 1) -> int:
    """Rows of one tile: a multiple of `row_multiple`, at least one of them."""
    return max(1, TILE_BYTES // (decode_row_bytes * row_multiple)) * row_multiple


def workspace_bytes(
    decode_row_bytes: int, num_tokens: int, out_features: int, in_features: int, dtype: str, row_multiple: int = 1
) -> int:
    """The tile while it is decoded, its product, and a float32 copy of another dtype's input."""
    rows = min(-(-out_features // row_multiple) * row_multiple, tile_rows(decode_row_bytes, row_multiple))
    copy_bytes = 0 if dtype == "F32" else 4 * num_tokens * in_features
    return rows * (decode_row_bytes + 4 * num_tokens) + copy_bytes


def matmul(
    x: torch.Tensor,
    decode: Callable[[slice], torch.Tensor],
    out_features: int,
    decode_row_bytes: int,
    row_multiple: int = 1,
) -> torch.Tensor:
    """`x W^T`, `(..., out)` in x's dtype, for `x` `(..., in)`; `decode` gives rows of the matrix, float32.

    `decode_row_bytes` is the most that `decode` allocates per row, its result included. Tiles begin at multiples of
    `row_multiple`.
    """
    values = x.reshape(-1, x.shape[-1]).float()
    out = x.new_empty(values.shape[0], out_features)
    step = tile_rows(decode_row_bytes, row_multiple)
    for first in range(0, out_features, step):
        rows = slice(first, min(first + step, out_features))
        out[:, rows] = values @ decode(rows).t()  # no name for the tile, or it would live while the next one is made
    return out.view(*x.shape[:-1], out_features)
