"""Second-level scales written out as float16, compiled: what kernels of one scale per group then read."""

from __future__ import annotations

from functools import cache

import torch

from haversack.kernels import ir_superscales
from haversack.kernels.ir_superscales import JOB, SuperscaleCase, superscale_text
from haversack.kernels.llvm import CompiledModule, compile_text, host_target
from haversack.kernels.threads import run_record, team_threads


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
    run_record(compiled(case), job_words(codes, superscales, out.data_ptr()), num_threads(rows))
    return out


def job_words(codes: torch.Tensor, superscales: torch.Tensor, out: int) -> list[int]:
    """The record of the compiled entry `run` for contiguous tensors as `expand` takes them; `out` is an address."""
    words = {"codes": codes.data_ptr(), "superscales": superscales.data_ptr(), "out": out, "rows": codes.shape[0]}
    return [words[name] for name in JOB]


def num_threads(rows: int) -> int:
    """Threads for so many rows, each of which should find a turn."""
    return team_threads(rows // ir_superscales.TURN_ROWS)


@cache
def compiled(case: SuperscaleCase) -> CompiledModule:
    """The compiled code, entry `run(record, parallel, threads)`."""
    return compile_text(superscale_text(case, host_target()), host_target())
