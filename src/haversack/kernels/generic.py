"""The kernel that runs everywhere: dequantize a tile of rows in float32, multiply, next tile.

The slowest kernel and the reference for the others. Its tile has a fixed number of bytes, so that no whole matrix is
ever dequantized. Error against float64: that of a float32 matmul over `in_features` columns.
"""

from __future__ import annotations

import torch

from haversack.codecs.bitpack import UNPACK_BYTES_PER_CODE, unpack_codes
from haversack.kernels.activations import rounded_activations, rounding_bytes
from haversack.kernels.format import PackedFormat

NAME = "generic-f32-tiles"

activation_bits = 16

TILE_BYTES = 4 << 20
"""Bytes of one tile while it is dequantized: a common L2 plus some L3; larger tiles measured no faster."""


def supports(fmt: PackedFormat, num_tokens: int, dtype: torch.dtype, activation_bits: int) -> bool:
    return True


def workspace_bytes(
    fmt: PackedFormat, num_tokens: int, out_features: int, dtype: torch.dtype, activation_bits: int
) -> int:
    """Tile (codes and float32 values), its scales, the tile's product, and a float32 copy of another dtype's input."""
    rows = min(out_features, tile_rows(fmt))
    copy_bytes = 0 if dtype == torch.float32 else 4 * num_tokens * fmt.in_features
    if activation_bits < 16:
        copy_bytes = rounding_bytes(fmt, num_tokens)
    return rows * (_row_bytes(fmt) + 4 * num_tokens) + copy_bytes


def rows_workspace_bytes(fmt: PackedFormat, num_rows: int) -> int:
    rows = min(num_rows, tile_rows(fmt))
    return rows * (_row_bytes(fmt) + fmt.row_bytes + 3 * fmt.num_groups)


def tile_rows(fmt: PackedFormat) -> int:
    return max(1, TILE_BYTES // _row_bytes(fmt))


def matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    fmt: PackedFormat,
    activation_bits: int,
) -> torch.Tensor:
    """`x W^T`, `(tokens, out)` in x's dtype, for `x` `(tokens, in)`."""
    out_features = codes.shape[0]
    out = x.new_empty(x.shape[0], out_features)
    values = rounded_activations(x, fmt) if activation_bits < 16 else x.float()
    step = tile_rows(fmt)
    for first in range(0, out_features, step):
        tile = slice(first, first + step)
        # No name for the tile: a name would keep it alive while the next one is made.
        out[:, tile] = values @ dequantize(codes[tile], scales[tile], None if zeros is None else zeros[tile], fmt).t()
    return out


def rows(
    index: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, fmt: PackedFormat
) -> torch.Tensor:
    """Rows `index` `(n,)` of the matrix, `(n, in)` float32."""
    out = torch.empty(index.shape[0], fmt.in_features, device=codes.device)
    step = tile_rows(fmt)
    for first in range(0, index.shape[0], step):
        chosen = index[first : first + step]
        out[first : first + step] = dequantize(
            codes[chosen], scales[chosen], None if zeros is None else zeros[chosen], fmt
        )
    return out


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, fmt: PackedFormat
) -> torch.Tensor:
    """Values, float32 `(rows, in)`, of packed rows: `(q - zero) * scale`, or `table[q] * scale`, group by group."""
    groups = (codes.shape[0], fmt.num_groups, fmt.padded_columns // fmt.num_groups)
    unpacked = unpack_codes(codes, fmt.bits, fmt.padded_columns)
    if fmt.table is not None:
        table = torch.tensor(fmt.table, device=codes.device)
        weight = table.index_select(0, unpacked.reshape(-1).int()).view(groups)
    else:
        weight = unpacked.to(torch.float32).view(groups)
        weight -= float(1 << (fmt.bits - 1)) if zeros is None else zeros.unsqueeze(-1)
    weight *= scale_values(scales, fmt).unsqueeze(-1)
    return weight.view(codes.shape[0], fmt.padded_columns)[:, : fmt.in_features]


def scale_values(scales: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """float32 scales, or float16 ones as they are, of stored ones."""
    return scales if fmt.scales == "f16" else (scales.to(torch.int32) << 23).view(torch.float32)


def _row_bytes(fmt: PackedFormat) -> int:
    """Workspace of one row: unpacking first, then codes (also as indices of a table) and values, and wider scales."""
    return max(UNPACK_BYTES_PER_CODE, 1 + 4 if fmt.table is None else 2 + 4 + 4) * fmt.unit_columns + 8 * fmt.num_groups
