"""Products with bit planes, compiled: table lookup, or counted bits for int8 activations, and tiles for many tokens.

    CompiledPlanes      few tokens: no weight is ever written out; the cost is linear in the number of planes
    CompiledPlaneTiles  many tokens: columns are written out for a tile of rows, for torch's matmul to take

Error of the first against float64, in parts of sum |x| times the sum of a weight's scales: 2^-18, sums in float32. With int8
activations everything within a group is integers and exact; half of 1/127 of the group's largest, per activation, is what
rounding them costs. Tiles: in float32 the same; where activations are bfloat16 the tile is bfloat16 too, 2^-9 of each weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch

from haversack.codecs.bitplanes import BLOCK_ROWS
from haversack.kernels.activations import rounded_activations, rounding_bytes
from haversack.kernels.compiled import ONEDNN_SCRATCH_BYTES, ONEDNN_SCRATCH_TOKEN_BYTES, TILE_BYTES
from haversack.kernels.format import PlaneFormat
from haversack.kernels.ir_planes import ARGUMENTS, TILE_ARGUMENTS, PlaneCase, plane_tiles_text, planes_text, way_of
from haversack.kernels.ir_team import SMALLEST_TURN_BYTES
from haversack.kernels.llvm import Target, compile_text
from haversack.kernels.threads import team_entry, team_threads

MOST_PLANES = 96
"""Tokens times bits up to which planes are multiplied as they lie; beyond, tiles are written out for a matmul. 4,096 by 4,096, one
thread of a busy machine, bfloat16, fastest of 7: at 1 bit 64 tokens took 16 ms by tables and 20 by tiles, 128 tokens 30 and 28; at 4
bits 16 tokens 9.7 and 10.3, 32 tokens 21 and 10."""


@dataclass(frozen=True)
class CompiledPlanes:
    """Sums of activations under the planes' signs, for few tokens."""

    target: Target
    activation_bits: int = 16
    times_tokens: int = 1
    """Tokens it is taken for, in parts of those that it takes without a measurement."""

    @property
    def NAME(self) -> str:
        return f"llvm-planes-{self.way}-{_vectors(self.target, self.way)}"

    @property
    def way(self) -> str:
        return way_of(self.target, self.activation_bits)

    def supports(self, fmt: PlaneFormat, num_tokens: int, dtype: torch.dtype, activation_bits: int) -> bool:
        """So few that planes are quicker than tiles, and that what is laid out for them takes no more than a tile."""
        held = TILE_BYTES // PlaneCase(fmt, self.way, self.target).token_bytes
        most = max(1, self.times_tokens * min(MOST_PLANES // fmt.bits, held))
        return activation_bits == self.activation_bits and num_tokens <= most

    def widened(self) -> CompiledPlanes:
        """The same for four times as many tokens: where a machine may be found to compute them faster so than by tiles."""
        return replace(self, times_tokens=4)

    def workspace_bytes(
        self, fmt: PlaneFormat, num_tokens: int, out_features: int, dtype: torch.dtype, activation_bits: int
    ) -> int:
        converted = 0 if dtype == torch.float32 else 4 * num_tokens * (fmt.in_features + out_features)
        return PlaneCase(fmt, self.way, self.target).workspace_bytes(num_tokens) + converted

    def matmul(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        out_features: int,
        fmt: PlaneFormat,
        activation_bits: int,
    ) -> torch.Tensor:
        case = PlaneCase(fmt, self.way, self.target)
        values = x.float().contiguous()
        out = values.new_empty(len(x), out_features)
        workspace = torch.empty(case.workspace_bytes(len(x)), dtype=torch.uint8)
        _compiled(case)(
            values.data_ptr(),
            workspace.data_ptr(),
            codes.data_ptr(),
            scales.data_ptr(),
            out.data_ptr(),
            len(codes),
            out_features,
            len(x),
            _num_threads(codes.nbytes),
        )
        return out.to(x.dtype)


@dataclass(frozen=True)
class CompiledPlaneTiles:
    """Tiles of columns written out, multiplied by torch: in bfloat16 where that is the input and the CPU multiplies it."""

    target: Target
    activation_bits: ClassVar[int] = 16

    @property
    def NAME(self) -> str:
        return f"llvm-plane-tiles-{_vectors(self.target, 'tiles')}"

    def supports(self, fmt: PlaneFormat, num_tokens: int, dtype: torch.dtype, activation_bits: int) -> bool:
        return True

    def workspace_bytes(
        self, fmt: PlaneFormat, num_tokens: int, out_features: int, dtype: torch.dtype, activation_bits: int
    ) -> int:
        computed = self._tile_dtype(dtype)
        rows = min(-(-out_features // BLOCK_ROWS), self._tile_blocks(fmt, computed)) * BLOCK_ROWS
        converted = num_tokens * fmt.in_features * computed.itemsize if computed != dtype else 0
        rounding = rounding_bytes(fmt, num_tokens) if activation_bits < 16 else 0
        scratch = ONEDNN_SCRATCH_BYTES + ONEDNN_SCRATCH_TOKEN_BYTES * num_tokens if computed == torch.bfloat16 else 0
        return rows * (fmt.padded_columns + num_tokens) * computed.itemsize + scratch + converted + rounding

    def matmul(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        out_features: int,
        fmt: PlaneFormat,
        activation_bits: int,
    ) -> torch.Tensor:
        computed = self._tile_dtype(x.dtype)
        out = x.new_empty(len(x), out_features)
        values = (rounded_activations(x, fmt) if activation_bits < 16 else x).to(computed)
        step = min(len(codes), self._tile_blocks(fmt, computed))
        memory = torch.empty(fmt.padded_columns * step * BLOCK_ROWS, dtype=computed)
        products = memory.new_empty(len(x) * step * BLOCK_ROWS)
        run = _tile_writer(fmt, str(computed).removeprefix("torch."), self.target)
        for first in range(0, len(codes), step):
            some = codes[first : first + step]
            rows = len(some) * BLOCK_ROWS
            tile = memory[: fmt.padded_columns * rows].view(fmt.padded_columns, rows)
            run(
                some.data_ptr(),
                scales[first : first + step].data_ptr(),
                tile.data_ptr(),
                len(some),
                _num_threads(some.nbytes),
            )
            product = products[: len(x) * rows].view(len(x), rows)
            torch.mm(values, tile[: fmt.in_features], out=product)
            start = first * BLOCK_ROWS
            out[:, start : start + rows] = product[:, : out_features - start]
        return out

    def _tile_dtype(self, dtype: torch.dtype) -> torch.dtype:
        multiplies = any(self.target.has(name) for name in ("avx512bf16", "amx-bf16", "bf16"))
        return torch.bfloat16 if dtype == torch.bfloat16 and multiplies else torch.float32

    def _tile_blocks(self, fmt: PlaneFormat, dtype: torch.dtype) -> int:
        return max(1, TILE_BYTES // (fmt.padded_columns * dtype.itemsize * BLOCK_ROWS))


def plane_kernels(target: Target) -> tuple[CompiledPlanes | CompiledPlaneTiles, ...]:
    """All kernels of bit planes, fast to general. Each runs on any CPU, by what instructions it has."""
    return (CompiledPlanes(target), CompiledPlanes(target, 8), CompiledPlaneTiles(target))


@cache
def _compiled(case: PlaneCase) -> Callable[..., None]:
    module = compile_text(planes_text(case), case.target)
    return team_entry(module, "run", ARGUMENTS)


@cache
def _tile_writer(fmt: PlaneFormat, dtype: str, target: Target) -> Callable[..., None]:
    module = compile_text(plane_tiles_text(fmt, dtype, target), target)
    return team_entry(module, "dequantize", TILE_ARGUMENTS)


def _num_threads(packed_bytes: int) -> int:
    return team_threads(packed_bytes // SMALLEST_TURN_BYTES)


def _vectors(target: Target, way: str) -> str:
    if way == "counts" and target.has("avx512vpopcntdq"):
        return "vpopcntdq"
    return next((name for name in ("avx512f", "avx2", "neon") if target.has(name)), "baseline")
