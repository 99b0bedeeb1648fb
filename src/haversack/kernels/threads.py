"""The thread team that kernels run in: torch's own OpenMP team, so that its threads are shared and never doubled.

`GOMP_parallel(function, data, num_threads, flags)` is the entry that gcc's OpenMP code calls (LLVM's OpenMP on Linux
has it too); a compiled kernel calls it with its own work function. One start of a warm team costs some microseconds.
Where there is none (macOS, Windows), kernels run in one thread, and `team_name` says so.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path


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
