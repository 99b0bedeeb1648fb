"""Kernels compiled for this machine, one per format, number of tokens and dtype, when first needed.

    CompiledMatvec   a few tokens: every packed byte is read once, codes go straight into dot products
    CompiledPanels   many tokens in bfloat16: rows are dequantized into panels that stay in cache, and multiplied there
    CompiledTiles    many tokens: rows are dequantized into a tile that stays in cache, for torch's matmul to take

Error of a matvec against float64, in parts of sum |x| (2^(bits-1) + |zero - 2^(bits-1)|) scale, half the grid's range
for every column: 2^-16, of which avx512-bf16 uses most with float32 activations (they become two bfloat16 terms) or with
2 and 3 bits (offsets, `Avx512Bf16`); then one rounding to the result's dtype. int8 activations: half of 1/127 of the
group's largest, per activation. Tiles: in float32 as a matvec; where activations are bfloat16 tiles and panels are bfloat16
too, 2^-9 of each weight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import ClassVar

import torch

from haversack.kernels import ir_dequantize, ir_matmul, ir_panels, ir_run
from haversack.kernels.activations import rounded_activations, rounding_bytes
from haversack.kernels.dot_schemes import SCHEMES, Avx512Bf16, Avx512F32, Avx512Vnni, DotScheme, VectorsF32
from haversack.kernels.format import PackedFormat
from haversack.kernels.ir_matmul import MatmulCase
from haversack.kernels.ir_panels import PanelCase
from haversack.kernels.ir_team import SMALLEST_TURN_BYTES
from haversack.kernels.llvm import CompiledModule, Target, compile_text, host_target
from haversack.kernels.threads import parallel_address, team_entry, team_threads

ROUND_TOKENS = (1, 2, 4)
"""Tokens multiplied with a row while it is read once; other numbers are padded to the next, more run in rounds over
rows that stay in cache. Eight at once ran out of registers: 62 us where two rounds of four took 47."""

MATVEC_MAX_TOKENS = {Avx512Bf16: 64, Avx512F32: 16, Avx512Vnni: 128, VectorsF32: 16}
"""Tokens up to which codes go straight into dot products; beyond, tiles are dequantized for a matmul. 4,096 x 4,096 at 4
bits, two threads, 64 tokens: 3.1 ms as bfloat16, 2.2 ms as int8, 3.7 ms by tiles; they meet at 96. Panels meet bfloat16 sooner: 2,048 x 2,048,
one thread's processor time, 1.61 and 1.65 ms at 48 tokens, 2.13 and 2.08 at 64."""

TILE_BYTES = 2 << 20
"""Bytes of one dequantized tile."""

ONEDNN_SCRATCH_BYTES, ONEDNN_SCRATCH_TOKEN_BYTES = 512 << 10, 1 << 10
"""What oneDNN's bfloat16 matmul may allocate for itself: at most 258 KiB and 512 bytes per token were seen."""


@dataclass(frozen=True)
class CompiledMatvec:
    """Dot products straight from packed codes, by one scheme, for at most `most_tokens` tokens."""

    scheme: type[DotScheme]
    target: Target
    most_tokens: int

    @property
    def NAME(self) -> str:
        name = f"llvm-{self.scheme.name}"
        return name if self.scheme.features else f"{name}-{_widest_vectors(self.target)}"

    @property
    def activation_bits(self) -> int:
        return self.scheme.activation_bits

    def supports(self, fmt: PackedFormat, num_tokens: int, dtype: torch.dtype, activation_bits: int) -> bool:
        scheme = self.scheme(fmt, self.target)
        return (
            num_tokens <= self.most_tokens
            and scheme.activation_bits in (activation_bits, 16)
            and scheme.holds_table
            and ir_matmul.supports(fmt, scheme)
        )

    def workspace_bytes(
        self, fmt: PackedFormat, num_tokens: int, out_features: int, dtype: torch.dtype, activation_bits: int
    ) -> int:
        case = _case(fmt, num_tokens, _computed(dtype), self.scheme, self.target)
        converted = 4 * num_tokens * (fmt.in_features + out_features) if dtype == torch.float16 else 0
        rounding = rounding_bytes(fmt, num_tokens) if activation_bits < self.scheme.activation_bits else 0
        return case.workspace_bytes(num_tokens) + converted + rounding

    def widened(self) -> CompiledMatvec:
        """The same for four times as many tokens: where a machine may be found to compute them faster so than by tiles."""
        return replace(self, most_tokens=4 * self.most_tokens)

    def matvec(self, fmt: PackedFormat, num_tokens: int, dtype: torch.dtype) -> Matvec:
        """The compiled code for activations of `dtype`, float32 or bfloat16."""
        return matvec(fmt, num_tokens, dtype, self.scheme, self.target)

    def matmul(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        fmt: PackedFormat,
        activation_bits: int,
    ) -> torch.Tensor:
        dtype = x.dtype
        if activation_bits < self.scheme.activation_bits:
            x = rounded_activations(x, fmt)
        x = x.to(_computed(dtype)).contiguous()
        return matvec(fmt, x.shape[0], x.dtype, self.scheme, self.target)(x, codes, scales, zeros).to(dtype)


class Matvec:
    """One compiled matvec, callable on tensors. `x` is `(tokens, in)`, contiguous, of the dtype it was compiled for."""

    def __init__(self, case: MatmulCase, module: CompiledModule):
        self.case = case
        self.module = module
        # The case's bytes are worked out once: as properties they cost more than a small matrix.
        self._round_bytes, self._fixed_bytes = case.round_bytes, case.workspace_bytes(0)
        self._row_bytes = case.fmt.row_bytes
        self._run = team_entry(module, "run", ir_run.RUN_ARGUMENTS)

    def call_words(self, num_rows: int, num_tokens: int, threads: int) -> dict[str, int]:
        """Arguments of the entry `run`, by name, that follow from the number of rows of all its matrices and the most threads."""
        threads = max(1, min(threads, num_rows * self._row_bytes // SMALLEST_TURN_BYTES))
        return {"tokens": num_tokens, "parallel": parallel_address(), "threads": threads}

    def __call__(
        self, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
    ) -> torch.Tensor:
        num_tokens, num_rows = x.shape[0], codes.shape[0]
        out = x.new_empty(num_tokens, num_rows)
        rounds = -(-num_tokens // self.case.tokens)
        workspace = torch.empty(rounds * self._round_bytes + self._fixed_bytes, dtype=torch.uint8)
        matrix = (ctypes.c_int64 * ir_run.MATRIX_WORDS)(
            codes.data_ptr(),
            scales.data_ptr(),
            0 if zeros is None else zeros.data_ptr(),
            out.data_ptr(),
            num_rows,
            num_rows,
        )
        self._run(
            x.data_ptr(),
            workspace.data_ptr(),
            ctypes.addressof(matrix),
            1,
            num_tokens,
            _num_threads(num_rows * self._row_bytes),
        )
        return out


@dataclass(frozen=True)
class CompiledPanels:
    """Panels of dequantized rows and all tokens, in bfloat16, multiplied where the panels are: no other library's call."""

    target: Target
    activation_bits: ClassVar[int] = 16
    NAME: ClassVar[str] = "llvm-panels-avx512bf16"

    def supports(self, fmt: PackedFormat, num_tokens: int, dtype: torch.dtype, activation_bits: int) -> bool:
        return dtype == torch.bfloat16 and ir_panels.supports(fmt, self.target)

    def workspace_bytes(
        self, fmt: PackedFormat, num_tokens: int, out_features: int, dtype: torch.dtype, activation_bits: int
    ) -> int:
        case = PanelCase(fmt, self.target)
        rounding = rounding_bytes(fmt, num_tokens) if activation_bits < 16 else 0
        threads = min(torch.get_num_threads(), case.num_turns(out_features))
        return case.arranged_bytes(num_tokens) + threads * case.thread_bytes(num_tokens) + 64 + rounding

    def matmul(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        fmt: PackedFormat,
        activation_bits: int,
    ) -> torch.Tensor:
        if activation_bits < 16:
            x = rounded_activations(x, fmt)
        case, (num_tokens, num_rows) = PanelCase(fmt, self.target), (x.shape[0], codes.shape[0])
        out = x.new_empty(num_tokens, num_rows)
        arrange, run = _panels(case)
        threads = team_threads(case.num_turns(num_rows))
        arranged_bytes = case.arranged_bytes(num_tokens)
        workspace = torch.empty(arranged_bytes + threads * case.thread_bytes(num_tokens) + 64, dtype=torch.uint8)
        start = -(-workspace.data_ptr() // 64) * 64
        arrange(x.data_ptr(), start, num_tokens, team_threads(ir_panels.num_blocks(num_tokens)))
        run(
            start,
            start + arranged_bytes,
            codes.data_ptr(),
            scales.data_ptr(),
            0 if zeros is None else zeros.data_ptr(),
            out.data_ptr(),
            num_rows,
            num_tokens,
            threads,
        )
        return out


@dataclass(frozen=True)
class CompiledTiles:
    """Tiles of dequantized rows, multiplied by torch: in bfloat16 where that is the input and the CPU multiplies it."""

    target: Target
    activation_bits: ClassVar[int] = 16

    @property
    def NAME(self) -> str:
        return f"llvm-tiles-{_widest_vectors(self.target)}"

    def supports(self, fmt: PackedFormat, num_tokens: int, dtype: torch.dtype, activation_bits: int) -> bool:
        return ir_dequantize.supports(fmt)

    def workspace_bytes(
        self, fmt: PackedFormat, num_tokens: int, out_features: int, dtype: torch.dtype, activation_bits: int
    ) -> int:
        computed = self._tile_dtype(dtype)
        rows = min(out_features, self._tile_rows(fmt, computed))
        converted = num_tokens * fmt.in_features * computed.itemsize if computed != dtype else 0
        rounding = rounding_bytes(fmt, num_tokens) if activation_bits < 16 else 0
        scratch = ONEDNN_SCRATCH_BYTES + ONEDNN_SCRATCH_TOKEN_BYTES * num_tokens if computed == torch.bfloat16 else 0
        return rows * (fmt.unit_columns + num_tokens) * computed.itemsize + scratch + converted + rounding

    def matmul(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        fmt: PackedFormat,
        activation_bits: int,
    ) -> torch.Tensor:
        out = x.new_empty(x.shape[0], codes.shape[0])
        computed = self._tile_dtype(x.dtype)
        if activation_bits < 16:
            x = rounded_activations(x, fmt)
        x = x.to(computed)
        step = self._tile_rows(fmt, computed)
        tile = torch.empty(min(step, codes.shape[0]), fmt.unit_columns, dtype=computed)
        products = tile.new_empty(x.shape[0] * tile.shape[0])
        for first in range(0, codes.shape[0], step):
            part = slice(first, min(first + step, codes.shape[0]))
            weight = tile[: part.stop - part.start]
            dequantize_rows(
                weight, None, codes[part], scales[part], None if zeros is None else zeros[part], fmt, self.target
            )
            product = products[: x.shape[0] * weight.shape[0]].view(x.shape[0], -1)
            out[:, part] = torch.mm(x, weight[:, : fmt.in_features].t(), out=product)
        return out

    def _tile_dtype(self, dtype: torch.dtype) -> torch.dtype:
        multiplies = self.target.has("avx512bf16") or self.target.has("amx-bf16") or self.target.has("bf16")
        return torch.bfloat16 if dtype == torch.bfloat16 and multiplies else torch.float32

    def _tile_rows(self, fmt: PackedFormat, dtype: torch.dtype) -> int:
        return max(16, TILE_BYTES // (fmt.unit_columns * dtype.itemsize) // 16 * 16)


def dequantize_rows(
    out: torch.Tensor,
    index: torch.Tensor | None,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    fmt: PackedFormat,
    target: Target | None = None,
) -> None:
    """Write rows `index` (int64), or all of them in order, to `out` `(rows, fmt.unit_columns)`, float32 or bfloat16."""
    run = _dequantizer(fmt, _name(out.dtype), target or host_target())
    num_rows = out.shape[0]
    run(
        codes.data_ptr(),
        scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(),
        out.data_ptr(),
        0 if index is None else index.data_ptr(),
        num_rows,
        _num_threads(num_rows * fmt.row_bytes),
    )


def matvecs(target: Target) -> tuple[CompiledMatvec, ...]:
    """The matvecs that run on `target`, fast to general."""
    return tuple(CompiledMatvec(s, target, MATVEC_MAX_TOKENS[s]) for s in SCHEMES if target.has(*s.features))


def matvec(fmt: PackedFormat, num_tokens: int, dtype: torch.dtype, scheme: type[DotScheme], target: Target) -> Matvec:
    """The matvec for a number of tokens: compiled, or loaded from the cache, when first needed."""
    rounds = -(-num_tokens // ROUND_TOKENS[-1])
    return _matvec(fmt, _round_tokens(num_tokens), min(4, 1 << (rounds - 1).bit_length()), dtype, scheme, target)


@cache
def _matvec(
    fmt: PackedFormat, tokens: int, rounds: int, dtype: torch.dtype, scheme: type[DotScheme], target: Target
) -> Matvec:
    case = MatmulCase(fmt, tokens, _name(dtype), scheme(fmt, target), target, rounds)
    return Matvec(case, compile_text(ir_run.matmul_text(case), target))


@lru_cache(maxsize=4096)
def _case(
    fmt: PackedFormat, num_tokens: int, dtype: torch.dtype, scheme: type[DotScheme], target: Target
) -> MatmulCase:
    return MatmulCase(fmt, _round_tokens(num_tokens), _name(dtype), scheme(fmt, target), target)


@cache
def _dequantizer(fmt: PackedFormat, dtype: str, target: Target) -> Callable[..., None]:
    module = compile_text(ir_dequantize.dequantize_text(fmt, dtype, target), target)
    return team_entry(module, "dequantize", ir_dequantize.DEQUANTIZE_ARGUMENTS)


@cache
def _panels(case: PanelCase) -> tuple[Callable[..., None], Callable[..., None]]:
    """Entries `arrange` and `run`."""
    module = compile_text(ir_panels.panels_text(case), case.target)
    arrange = team_entry(module, "arrange", ir_panels.ARRANGE_ARGUMENTS)
    return arrange, team_entry(module, "run", ir_panels.RUN_ARGUMENTS)


def _round_tokens(num_tokens: int) -> int:
    return next((t for t in ROUND_TOKENS if t >= num_tokens), ROUND_TOKENS[-1])


def _computed(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _num_threads(packed_bytes: int) -> int:
    """torch's threads, but one where there is less than a turn of work for each."""
    return team_threads(packed_bytes // SMALLEST_TURN_BYTES)


def _widest_vectors(target: Target) -> str:
    return next((name for name in ("avx512f", "avx2", "neon") if target.has(name)), "baseline")
