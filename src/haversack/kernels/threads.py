"""The thread team that kernels run in: torch's own OpenMP team, so that its threads are shared and never doubled.

`GOMP_parallel(function, data, num_threads, flags)` is the entry that gcc's OpenMP code calls (LLVM's OpenMP on Linux
has it too); a compiled kernel calls it with its own work function. One start of a warm team costs some microseconds.
Where there is none (macOS, Windows), kernels run in one thread, and `team_name` says so.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from haversack.kernels.ir_team import TEAM_ARGUMENTS

if TYPE_CHECKING:
    from haversack.kernels.llvm import CompiledModule

_WORDS = {"ptr": ctypes.c_void_p, "i64": ctypes.c_int64, "i32": ctypes.c_int32}

_LIMIT: ContextVar[int | None] = ContextVar("most threads of a team", default=None)


@cache
def parallel_address() -> int:
    """Address of `GOMP_parallel` in the OpenMP library that torch loaded, or 0."""
    import torch  # noqa: F401  (loads its OpenMP library)

    for path in _openmp_libraries():
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


@contextlib.contextmanager
def at_most(threads: int | None) -> Iterator[None]:
    """Compiled kernels called inside take no more threads than that; None leaves them torch's."""
    before = _LIMIT.set(threads)
    try:
        yield
    finally:
        _LIMIT.reset(before)


def team_threads(num_turns: int) -> int:
    """Threads for work of so many turns: torch's, or fewer where `at_most` says so, and one at least."""
    import torch

    limit = _LIMIT.get()
    threads = torch.get_num_threads()
    return max(1, min(threads if limit is None else min(threads, limit), num_turns))


def team_entry(module: CompiledModule, name: str, arguments: Sequence[tuple[str, str]]) -> Callable[..., None]:
    """A team's entry (`ir_team.py`) as a function of its `arguments`, `(type, name)` each, and the number of threads.

    It keeps the module's code alive.
    """
    types = [_WORDS[type_] for type_, _ in [*arguments, *TEAM_ARGUMENTS]]
    function, parallel = ctypes.CFUNCTYPE(None, *types)(module.address(name)), parallel_address()

    def call(*given: int) -> None:
        function(*given[:-1], parallel, given[-1])

    call.module = module  # type: ignore[attr-defined]
    return call


def run_record(module: CompiledModule, words: Sequence[int], threads: int) -> None:
    """Call the entry `run` of a module whose arguments lie in an array of 64-bit words (`ir_team.add_record_entry`)."""
    record = (ctypes.c_int64 * len(words))(*words)
    team_entry(module, "run", [("ptr", "record")])(ctypes.addressof(record), threads)


def team_name() -> str:
    return "openmp" if parallel_address() else "one-thread"


def _openmp_libraries() -> list[str]:
    """OpenMP libraries mapped into this process (wheels rename theirs, so the name alone won't find it)."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = dict.fromkeys(line.split(maxsplit=5)[5] for line in lines if line.count("/"))
    return [p for p in paths if Path(p).name.startswith(("libgomp", "libomp", "libiomp5"))]
