"""Triton kernels of the packed matmul: one token or few by sums, more by dequantized tiles that go into `tl.dot`.

Importing this file needs triton (`pip install 'haversack[gpu]'`); the registry asks `triton_kernels` first. Codes are read in layout
`rows-v1` as they lie (`codecs/bitpack.py`): column c of a unit is `bits` bits of byte `c mod 8 bits`. Nothing is
autotuned, and no time was measured yet: the interpreter says whether results are right.

Error against float64, in parts of sum |x| times half the grid's range: 2^-18 by sums, in float32; by tiles, weights are
rounded to the activations' dtype (2^-9 of each in bfloat16) and products summed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl

from haversack.kernels.activations import rounded_activations, rounding_bytes
from haversack.kernels.format import PackedFormat

FEW_TOKENS = 8
"""Tokens up to which every program sums over columns for one token; beyond, a tile of tokens is multiplied at once."""

ROWS, TILE_TOKENS, TILE_ROWS, COLUMNS = 16, 16, 32, 128
"""Rows of a program that sums; tokens and rows of a tile; columns that either takes at a time, in whole units of 64."""


@triton.jit
def _weights(
    codes, scales, zeros, table, rows, columns, there,
    ROW_BYTES: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr, HAS_TABLE: tl.constexpr, EXPONENTS: tl.constexpr,
):  # fmt: skip
    """float32 values `(rows, columns)` of packed codes, zero where there are none."""
    BASE: tl.constexpr = 2 if BITS == 3 else BITS
    PLANE: tl.constexpr = 8 * BASE
    unit, within = columns // 64, columns % 64
    row = codes + rows[:, None] * ROW_BYTES
    byte = tl.load(row + (unit * PLANE + within % PLANE)[None, :], mask=there, other=0).to(tl.int32)
    code = (byte >> ((within // PLANE) * BASE)[None, :]) & ((1 << BASE) - 1)
    if BITS == 3:
        high = row + ROW_BYTES // 3 * 2 + (unit * 8 + within % 8)[None, :]
        byte = tl.load(high, mask=there, other=0).to(tl.int32)
        code += ((byte >> (within // 8)[None, :]) & 1) << 2
    group = rows[:, None] * GROUPS + (columns // GROUP_SIZE)[None, :]
    if EXPONENTS:
        scale = (tl.load(scales + group, mask=there, other=0).to(tl.int32) << 23).to(tl.float32, bitcast=True)
    else:
        scale = tl.load(scales + group, mask=there, other=0.0).to(tl.float32)
    if HAS_TABLE:
        value = tl.load(table + code)
    elif SYMMETRIC:
        value = (code - (1 << (BITS - 1))).to(tl.float32)
    else:
        value = (code - tl.load(zeros + group, mask=there, other=0).to(tl.int32)).to(tl.float32)
    return tl.where(there, value * scale, 0.0)


@triton.jit
def _sums(
    x, codes, scales, zeros, table, out, num_rows,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, IN: tl.constexpr,
    ROW_BYTES: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr, HAS_TABLE: tl.constexpr, EXPONENTS: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows for one token."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, IN, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        there = (rows < num_rows)[:, None] & (columns < IN)[None, :]
        values = _weights(
            codes, scales, zeros, table, rows, columns, there,
            ROW_BYTES, GROUPS, GROUP_SIZE, BITS, SYMMETRIC, HAS_TABLE, EXPONENTS,
        )  # fmt: skip
        given = tl.load(x + token * IN + columns, mask=columns < IN, other=0.0).to(tl.float32)
        total += tl.sum(values * given[None, :], axis=1)
    tl.store(out + token * num_rows + rows, total.to(out.dtype.element_ty), mask=rows < num_rows)


@triton.jit
def _tiles(
    x, codes, scales, zeros, table, out, num_rows, num_tokens,
    TOKENS: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IN: tl.constexpr,
    ROW_BYTES: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr, HAS_TABLE: tl.constexpr, EXPONENTS: tl.constexpr,
):  # fmt: skip
    """`TOKENS` tokens by `ROWS` rows: dequantize a piece of both, multiply, next piece."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for first in range(0, IN, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        there = (rows < num_rows)[:, None] & (columns < IN)[None, :]
        values = _weights(
            codes, scales, zeros, table, rows, columns, there,
            ROW_BYTES, GROUPS, GROUP_SIZE, BITS, SYMMETRIC, HAS_TABLE, EXPONENTS,
        )  # fmt: skip
        some = (tokens < num_tokens)[:, None] & (columns < IN)[None, :]
        given = tl.load(x + tokens[:, None] * IN + columns[None, :], mask=some, other=0.0)
        values = values.to(given.dtype)
        if WIDEN:
            given, values = given.to(tl.float32), values.to(tl.float32)
        total = tl.dot(given, tl.trans(values), total, input_precision="ieee")
    place = out + tokens[:, None] * num_rows + rows[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(tokens < num_tokens)[:, None] & (rows < num_rows)[None, :])


@dataclass(frozen=True)
class TritonKernel:
    """Both, as the registry knows them: sums for few tokens, tiles for any number."""

    tiles: bool
    activation_bits: ClassVar[int] = 16

    @property
    def NAME(self) -> str:
        return "triton-tiles" if self.tiles else "triton-sums"

    def supports(self, fmt: PackedFormat, num_tokens: int, dtype: torch.dtype, activation_bits: int) -> bool:
        """Groups may be of any size; offsets within a matrix fit 31 bits up to 2 GiB of codes."""
        known = dtype in (torch.float32, torch.bfloat16, torch.float16)
        return known and (self.tiles or num_tokens <= FEW_TOKENS)

    def workspace_bytes(
        self, fmt: PackedFormat, num_tokens: int, out_features: int, dtype: torch.dtype, activation_bits: int
    ) -> int:
        """The table on the device, and rounded activations in float32 and in their own dtype."""
        rounding = 0 if activation_bits == 16 else rounding_bytes(fmt, num_tokens) + 4 * num_tokens * fmt.in_features
        return rounding + (0 if fmt.table is None else 4 * len(fmt.table))

    def matmul(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        fmt: PackedFormat,
        activation_bits: int,
    ) -> torch.Tensor:
        """`x W^T`, `(tokens, out)` in x's dtype, for contiguous `x` `(tokens, in)`."""
        num_tokens, num_rows = len(x), len(codes)
        out = x.new_empty(num_tokens, num_rows)
        given = x if activation_bits == 16 else rounded_activations(x, fmt).to(x.dtype).contiguous()
        table = scales if fmt.table is None else torch.tensor(fmt.table, device=x.device)
        tensors = (given, codes, scales, scales if zeros is None else zeros, table, out, num_rows)
        form = {
            "COLUMNS": COLUMNS,
            "IN": fmt.in_features,
            "ROW_BYTES": fmt.row_bytes,
            "GROUPS": fmt.num_groups,
            "GROUP_SIZE": fmt.group_size or fmt.unit_columns,
            "BITS": fmt.bits,
            "SYMMETRIC": fmt.symmetric,
            "HAS_TABLE": fmt.table is not None,
            "EXPONENTS": fmt.scales == "e8m0",
        }
        if self.tiles:
            grid = (triton.cdiv(num_rows, TILE_ROWS), triton.cdiv(num_tokens, TILE_TOKENS))
            # The interpreter's dot takes bfloat16's bits for integers; the same numbers in float32 give the same products.
            widen = x.device.type == "cpu" and x.dtype == torch.bfloat16
            _tiles[grid](*tensors, num_tokens, TOKENS=TILE_TOKENS, WIDEN=widen, ROWS=TILE_ROWS, **form)
        else:
            _sums[(triton.cdiv(num_rows, ROWS), num_tokens)](*tensors, ROWS=ROWS, **form)
        return out
