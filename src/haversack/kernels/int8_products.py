"""Products of many tokens by 8-bit activations in int8, compiled: for CPUs with AVX-512 VNNI.

Error against float64, as with one token's int8 kernel: half of 1/127 of the group's largest, per activation. Everything
within a group is integers and exact; scaled sums of groups are float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import ClassVar, NamedTuple

import torch

from haversack.kernels import ir_int8
from haversack.kernels.format import PackedFormat
from haversack.kernels.ir_int8 import BLOCK_ROWS, MULTIPLY_ARGUMENTS, QUANTIZE_ARGUMENTS, Int8Case, int8_text
from haversack.kernels.llvm import Target, compile_text
from haversack.kernels.threads import parallel_address, team_threads

LEAST_TOKENS = 9
"""Tokens from which unpacking a panel for all is faster than one token's kernel, which unpacks for four at a time. 512 by 4,096 at 4 bits,
one thread, panels and the other in us: 4 tokens 61 and 46, 8 tokens 82 and 81, 12 tokens 106 and 118, 16 tokens 129 and 154."""

MOST_TOKENS = 512
"""Tokens whose activations are held in int8 at a time; more are taken one after the other, at a read of the weights each."""

_WORD = {"ptr": ctypes.c_void_p, "i64": ctypes.c_int64}
_QUANTIZE = ctypes.CFUNCTYPE(None, *[_WORD[t] for t, _ in QUANTIZE_ARGUMENTS], ctypes.c_void_p, ctypes.c_int32)
_MULTIPLY = ctypes.CFUNCTYPE(None, *[_WORD[t] for t, _ in MULTIPLY_ARGUMENTS], ctypes.c_void_p, ctypes.c_int32)


@dataclass(frozen=True)
class CompiledInt8Products:
    """Panels of unsigned codes times int8 activations. A panel and its sums lie on the threads' stacks, which no ledger counts:
    some 110 KB, and while a token is rounded four bytes per column."""

    target: Target
    NAME: ClassVar[str] = "llvm-int8-panels-avx512-vnni"
    activation_bits: ClassVar[int] = 8

    def supports(self, fmt: PackedFormat, num_tokens: int, dtype: torch.dtype, activation_bits: int) -> bool:
        return activation_bits == 8 and num_tokens >= LEAST_TOKENS and ir_int8.supports(fmt, self.target)

    def workspace_bytes(
        self, fmt: PackedFormat, num_tokens: int, out_features: int, dtype: torch.dtype, activation_bits: int
    ) -> int:
        """Activations in int8 with their scales; and, of float16, copies in float32."""
        converted = 4 * num_tokens * (fmt.in_features + out_features) if dtype == torch.float16 else 0
        return _case(fmt, _computed(dtype), self.target).workspace_bytes(min(num_tokens, MOST_TOKENS)) + converted

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
        case = _case(fmt, _computed(dtype), self.target)
        compiled = _compiled(case)
        values = x.to(_computed(dtype)).contiguous()
        num_tokens, num_rows = x.shape[0], codes.shape[0]
        out = values.new_empty(num_tokens, num_rows)
        workspace = torch.empty(case.workspace_bytes(min(num_tokens, MOST_TOKENS)), dtype=torch.uint8)
        threads = team_threads(-(-num_rows // BLOCK_ROWS))
        for first in range(0, num_tokens, MOST_TOKENS):
            some = values[first : first + MOST_TOKENS]
            compiled.quantize(some.data_ptr(), workspace.data_ptr(), len(some), parallel_address(), threads)
            compiled.multiply(
                workspace.data_ptr(),
                codes.data_ptr(),
                scales.data_ptr(),
                0 if zeros is None else zeros.data_ptr(),
                out[first:].data_ptr(),
                num_rows,
                len(some),
                parallel_address(),
                threads,
            )
        return out.to(dtype)


class _Compiled(NamedTuple):
    quantize: Callable[..., None]
    multiply: Callable[..., None]
    module: object  # the code lives as long as its functions


@cache
def _compiled(case: Int8Case) -> _Compiled:
    module = compile_text(int8_text(case), case.target)
    return _Compiled(_QUANTIZE(module.address("quantize")), _MULTIPLY(module.address("multiply")), module)


@lru_cache(maxsize=4096)
def _case(fmt: PackedFormat, dtype: torch.dtype, target: Target) -> Int8Case:
    return Int8Case(fmt, str(dtype).removeprefix("torch."), target)


def _computed(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
