"""Second-level scales written out as float16, compiled: what kernels of one scale per group then read."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from haversack.kernels import ir_superscales
from haversack.kernels.ir_superscales import JOB, SuperscaleCase, superscale_text
from haversack.kernels.llvm import CompiledModule, compile_text, host_target
from haversack.kernels.threads import parallel_address

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)


def supported() -> bool:
    """Whether this machine runs the compiled code."""
    return ir_superscales.supports(host_target())


def expand(codes: torch.Tensor, superscales: torch.Tensor, case: SuperscaleCase) -> torch.Tensor:
    """float16 scales `(rows, groups)` of packed codes uint8 `(rows, blocks * block_bytes)` under float16 `(rows, blocks)`.

    Allocates its result alone.
    """
    rows = codes.shape[0]
    assert codes.shape == (rows, case.blocks * case.block_bytes) and superscales.shape == (rows, case.blocks)
    codes, superscales = codes.contiguous(), superscales.contiguous()
    out = torch.empty(rows, case.groups, dtype=torch.float16)
    tensors = {"codes": codes, "superscales": superscales, "out": out}
    job = (ctypes.c_int64 * len(JOB))(*[tensors[n].data_ptr() if n in tensors else rows for n in JOB])
    threads = max(1, min(torch.get_num_threads(), rows // ir_superscales.TURN_ROWS))
    _FUNCTION(_module(case).address("run"))(ctypes.addressof(job), parallel_address(), threads)
    return out


@cache
def _module(case: SuperscaleCase) -> CompiledModule:
    return compile_text(superscale_text(case, host_target()), host_target())
