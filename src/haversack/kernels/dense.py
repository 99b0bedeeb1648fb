"""Products of few tokens with a matrix in bfloat16 as it lies in the checkpoint, compiled: at the rate of a plain read, where torch's take twice as long.

Sums are in float32 and rounded once. Error: as any sum of `columns` products in float32, in another order than torch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch

from haversack.kernels.ir_dense import JOB, MOST_TOKENS, STEP_COLUMNS, dense_text, workspace_bytes
from haversack.kernels.ir_team import SMALLEST_TURN_BYTES
from haversack.kernels.llvm import CompiledModule, compile_text, host_target
from haversack.kernels.threads import parallel_address, team_threads

NAME = "llvm-dense-bf16"

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)


def supports(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Few tokens `(tokens, columns)` and a plain matrix `(rows, columns)`, both bfloat16 on the CPU and contiguous."""
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.device.type == "cpu"
    both = all(tensor.dtype == torch.bfloat16 and tensor.ndim == 2 and tensor.is_contiguous() for tensor in (x, weight))
    return plain and both and len(x) <= MOST_TOKENS and weight.shape[1] % STEP_COLUMNS == 0


def prepared(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, workspace: torch.Tensor) -> Callable[[], None]:
    """A call that writes `x W^T` to `out` `(tokens, rows)`, whose rows are contiguous, from whatever `x` and `weight` hold by then. It uses
    `workspace_bytes` of `workspace`, uint8."""
    tokens, columns = x.shape
    assert supports(x, weight) and out.shape == (tokens, len(weight)) and out.stride(1) == 1
    assert workspace.nbytes >= workspace_bytes(tokens, columns)
    addresses = {"x": x, "laid_out": workspace, "weight": weight, "out": out}
    numbers = {"rows": len(weight), "out_stride": out.stride(0)}
    words = [addresses[name].data_ptr() if name in addresses else numbers[name] for name in JOB]
    job = (ctypes.c_int64 * len(JOB))(*words)
    module = _module(columns, tokens)
    run = _FUNCTION(module.address("run"))
    at, parallel = ctypes.addressof(job), parallel_address()
    threads = team_threads(weight.nbytes // SMALLEST_TURN_BYTES)
    kept = (module, job, addresses)  # as long as the call

    def call(kept: object = kept) -> None:
        run(at, parallel, threads)

    return call


def matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x W^T`, `(tokens, rows)` in bfloat16."""
    out = x.new_empty(len(x), len(weight))
    prepared(x, weight, out, torch.empty(workspace_bytes(*x.shape), dtype=torch.uint8))()
    return out


@cache
def _module(columns: int, tokens: int) -> CompiledModule:
    target = host_target()
    return compile_text(dense_text(columns, tokens, target), target)
