"""A plain read with the same threads: the bound that packed kernels are compared with."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import cache

import torch

from haversack.errors import UsageError
from haversack.kernels.ir import Function, Module, Value, zeros
from haversack.kernels.ir_team import add_team_entry
from haversack.kernels.llvm import compile_text, host_target
from haversack.kernels.threads import team_entry

TURN_BYTES = 256 << 10
"""Bytes of one thread's turn."""

_ARGUMENTS = [("ptr", "data"), ("i64", "num_turns"), ("ptr", "total")]


def read_bytes_per_second(data: torch.Tensor, num_threads: int | None = None) -> float:
    """Read `data` once, every byte of it, with `num_threads` (torch's number if not given); bytes per second.

    `data` should be larger than the caches by far: at least 4 GiB for a number to be quoted.
    """
    num_bytes = data.numel() * data.element_size()
    if not data.is_contiguous() or num_bytes < TURN_BYTES:
        raise UsageError(f"a read is measured over at least {TURN_BYTES} contiguous bytes, got {num_bytes}")
    run = _reader()
    turns = num_bytes // TURN_BYTES
    total = ctypes.c_int64()
    started = time.perf_counter()
    run(data.data_ptr(), turns, ctypes.addressof(total), num_threads or torch.get_num_threads())
    return turns * TURN_BYTES / (time.perf_counter() - started)


@cache
def _reader() -> Callable[..., None]:
    module = compile_text(_text(), host_target())
    return team_entry(module, "run", _ARGUMENTS)


def _text() -> str:
    """`run(data, turns, total, parallel, threads)`: the sum of all 64-bit words, so that no read can be left out."""
    module = Module()
    add_team_entry(module, "run", _ARGUMENTS, lambda f: {}, _turn)
    return module.text()


def _turn(f: Function, fields: dict[str, Value], turn: Value) -> None:
    base = f.offset(fields["data"], f.times(turn, TURN_BYTES))

    def lines(i: Value, sums: list[Value]) -> list[Value]:
        return [
            f.binary("add", s, f.load("<8 x i64>", f.offset(f.offset(base, i), 64 * k))) for k, s in enumerate(sums)
        ]

    sums = f.loop(TURN_BYTES, [zeros("<8 x i64>")] * 8, lines, step=64 * 8)
    for other in sums[1:]:
        sums[0] = f.binary("add", sums[0], other)
    word = f.call("i64", "llvm.vector.reduce.add.v8i64", sums[0])
    f.value("i64", f"atomicrmw add {fields['total']}, {word} monotonic")
