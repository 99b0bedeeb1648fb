"""torch's own packed matmuls, fed a tile of rows at a time: what computes where no kernel compiled here can, for bfloat16 activations.

    torch-int8          `_weight_int8pack_mm`: signed bytes, row by row, with one bfloat16 scale per row.
    torch-int4-<isa>    `_weight_int4pack_mm_for_cpu`: a layout that depends on the instruction set torch was dispatched to.

Neither reads layout `rows-v1` as it lies in the file: int8 wants signed bytes, int4 its own order, which another machine could not
read. A file of them could not be mapped, and repacking a whole matrix on loading would hold it twice; so a tile of rows
is laid out anew in every product, in declared workspace, which pays for many tokens only. `TorchPacked` holds a whole matrix so, to be measured beside
(`benchmarks/kernels.py`: both are slower than the compiled kernels at one token and at many). Both want bfloat16
activations: float32 ones take a path without vectors, some twenty times slower. Values: int4 `(q - 8) * scale + zero`, int8 `q * scale`, with
scales rounded to bfloat16 (2^-9).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from haversack.codecs.bitpack import UNPACK_BYTES_PER_CODE, unpack_codes
from haversack.errors import UsageError
from haversack.kernels.format import PackedFormat

INT4_GROUP_SIZES, INT4_ROWS = (32, 64, 128, 256), 16
"""Groups that torch's int4 takes, and what its rows come in multiples of."""

TILE_BYTES = 4 << 20
"""Of one tile's workspace: as the generic kernel's."""


@dataclass(frozen=True)
class TorchPacked:
    """A matrix in one of torch's layouts: `layout` names it, `weight` and `scales` are what torch's operator takes."""

    layout: str
    weight: torch.Tensor
    scales: torch.Tensor
    group_size: int

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x W^T`, `(tokens, out)` bfloat16, for `x` `(tokens, in)` bfloat16."""
        if x.dtype != torch.bfloat16:
            raise UsageError(f"torch's packed matmuls are used with bfloat16 activations, got {x.dtype}")
        if self.group_size:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, self.group_size, self.scales)
        return torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scales)


def pack_torch_int8(codes: torch.Tensor, scales: torch.Tensor) -> TorchPacked:
    """Codes uint8 `(out, in)` around 128 and scales `(out, 1)`, as torch's int8 layout."""
    return TorchPacked("torch-int8", (codes ^ 128).view(torch.int8), scales.reshape(-1).bfloat16(), 0)


def pack_torch_int4(
    codes: torch.Tensor, scales: torch.Tensor, group_size: int, zeros: torch.Tensor | None = None
) -> TorchPacked:
    """Codes uint8 `(out, in)` of 0 to 15 and scales `(out, groups)`, around `zeros` (8 if not given), as this machine's torch
    int4 layout."""
    if group_size not in INT4_GROUP_SIZES or codes.shape[1] % group_size or codes.shape[0] % INT4_ROWS:
        raise UsageError(
            f"torch's int4 takes groups of 32, 64, 128 or 256 that divide the columns and multiples of 16 rows, "
            f"asked for {tuple(codes.shape)} in groups of {group_size}"
        )
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 2)
    offsets = torch.zeros_like(scales) if zeros is None else (8 - zeros.to(scales.dtype)) * scales
    both = torch.stack([scales.t(), offsets.t()], dim=-1).bfloat16().contiguous()
    isa = torch.backends.cpu.get_cpu_capability().lower()
    return TorchPacked(f"torch-int4-{isa}", weight, both, group_size)


class TorchTiles:
    """A `PackedKernel` of 4 or 8 bits: a tile of rows is laid out as torch wants it, multiplied, and the next one follows."""

    activation_bits = 16

    def __init__(self, bits: int):
        self.bits = bits
        isa = torch.backends.cpu.get_cpu_capability().lower()
        self.NAME = "torch-int8-tiles" if bits == 8 else f"torch-int4-{isa}-tiles"

    def supports(self, fmt: PackedFormat, num_tokens: int, dtype: torch.dtype, activation_bits: int) -> bool:
        if (fmt.bits, fmt.table, fmt.scales) != (self.bits, None, "f16") or dtype != torch.bfloat16:
            return False
        if self.bits == 8:
            return activation_bits == 16 and fmt.symmetric and fmt.num_groups == 1
        return activation_bits == 16 and fmt.group_size in INT4_GROUP_SIZES and fmt.in_features % fmt.group_size == 0

    def workspace_bytes(
        self, fmt: PackedFormat, num_tokens: int, out_features: int, dtype: torch.dtype, activation_bits: int
    ) -> int:
        """One tile: codes while they are unpacked, then in torch's layout, its scales, and its product."""
        rows = min(out_features, self._tile_rows(fmt)) + INT4_ROWS
        return rows * (self._row_bytes(fmt) + 2 * num_tokens)

    def matmul(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        fmt: PackedFormat,
        activation_bits: int,
    ) -> torch.Tensor:
        """`x W^T`, `(tokens, out)` bfloat16, for `x` `(tokens, in)`."""
        out_features, step = codes.shape[0], self._tile_rows(fmt)
        out = x.new_empty(x.shape[0], out_features)
        for first in range(0, out_features if len(x) else 0, step):
            tile = slice(first, min(first + step, out_features))
            packed = self._laid_out(codes[tile], scales[tile], None if zeros is None else zeros[tile], fmt)
            out[:, tile] = packed.matmul(x)[:, : tile.stop - first]
        return out

    def _laid_out(
        self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, fmt: PackedFormat
    ) -> TorchPacked:
        """Packed rows in torch's layout, with rows of zeros up to a multiple that it takes."""
        import torch.nn.functional as F

        values = unpack_codes(codes, self.bits, fmt.in_features)
        if self.bits == 8:
            return pack_torch_int8(values, scales)
        more = (0, 0, 0, -len(codes) % INT4_ROWS)
        padded = None if zeros is None else F.pad(zeros, more)
        return pack_torch_int4(F.pad(values, more), F.pad(scales, more), fmt.group_size, padded)

    def _tile_rows(self, fmt: PackedFormat) -> int:
        return max(1, TILE_BYTES // self._row_bytes(fmt) // INT4_ROWS) * INT4_ROWS

    def _row_bytes(self, fmt: PackedFormat) -> int:
        """Codes while they are unpacked, or padded, widened to int32 and in nibbles; scales and offsets on the way to bfloat16."""
        per_code = UNPACK_BYTES_PER_CODE if self.bits == 8 else 1 + 1 + 4 + 1
        return per_code * fmt.unit_columns + 16 * fmt.num_groups
