"""A plain read with the same threads: the bound that packed kernels are compared with."""

from __future__ import annotations

import ctypes
import time
from functools import cache

import torch

from haversack.errors import UsageError
from haversack.kernels.ir import Function, Module, Value, zeros
from haversack.kernels.llvm import compile_text, host_target
from haversack.kernels.threads import parallel_address

TURN_BYTES = 256 << 10
"""Bytes of one thread's turn."""


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
    run(data.data_ptr(), turns, ctypes.addressof(total), parallel_address(), num_threads or torch.get_num_threads())
    return turns * TURN_BYTES / (time.perf_counter() - started)


@cache
def _reader():
    module = compile_text(_text(), host_target())
    signature = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32
    )
    function = signature(module.address("run"))
    function.module = module  # type: ignore[attr-defined]  # the code lives as long as the function
    return function


def _text() -> str:
    """`run(data, turns, total, parallel, threads)`: the sum of all 64-bit words, so that no read can be left out."""
    module = Module()
    f = Function(module, "work", [("ptr", "job")])
    data, turns, total = (
        f.load(t, f.offset(f.arguments["job"], 8 * i), 8) for i, t in enumerate(["ptr", "i64", "ptr"])
    )
    counter = f.offset(f.arguments["job"], 24)

    def take() -> Value:
        return f.value("i64", f"atomicrmw add {counter}, i64 1 monotonic")

    def turn(state: list[Value]) -> list[Value]:
        base = f.offset(data, f.times(state[0], TURN_BYTES))

        def lines(i: Value, sums: list[Value]) -> list[Value]:
            return [
                f.binary("add", s, f.load("<8 x i64>", f.offset(f.offset(base, i), 64 * k))) for k, s in enumerate(sums)
            ]

        sums = f.loop(TURN_BYTES, [zeros("<8 x i64>")] * 8, lines, step=64 * 8)
        for other in sums[1:]:
            sums[0] = f.binary("add", sums[0], other)
        word = f.call("i64", "llvm.vector.reduce.add.v8i64", sums[0])
        f.do(f"%ignored{state[0].name[1:]} = atomicrmw add {total}, {word} monotonic")
        return [take()]

    f.while_less(take(), turns, turn)
    f.end()
    g = Function(
        module, "run", [("ptr", "data"), ("i64", "turns"), ("ptr", "total"), ("ptr", "parallel"), ("i32", "threads")]
    )
    job = g.value("ptr", "alloca [4 x i64], align 64")
    for i, field in enumerate(["data", "turns", "total"]):
        g.store(g.arguments[field], g.offset(job, 8 * i), 8)
    g.store(Value("i64", "0"), g.offset(job, 24), 8)
    parallel, threads = g.arguments["parallel"], g.arguments["threads"]
    given = g.value("i1", f"icmp ne {parallel}, null")
    together = g.binary("and", given, g.value("i1", f"icmp sgt {threads}, 1"))
    g.when(together, lambda: g.do(f"call void {parallel.name}(ptr @work, {job}, {threads}, i32 0)"))
    g.do(f"call void @work({job})")
    g.end()
    return module.text()
