"""Which kernel, with how many threads, was fastest for a case on this machine: measured when asked for, kept on disk.

A case is a format (its columns among it), a number of tokens (in powers of two), the activations' dtype and bits. Contenders
take turns on random weights that rotate through more than caches hold, some milliseconds each. The first kernel of the
registry stays unless another is faster by `LEAST_GAIN`, so that noise decides nothing.

A choice may save time and never costs a byte: a kernel whose declared workspace is larger than the first one's is no
contender, so that what a plan promises, made before or after measuring, holds. Results differ within the kernels' stated
tolerances. Source: Hong et al. 2023 (FlashDecoding++, arXiv 2311.01282, section 5: which implementation per shape and number of
tokens, profiled beforehand); differs in measuring every power of two instead of inflection points, and threads too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from haversack._version import __version__
from haversack.cache import cache_folder
from haversack.describe.machine import cpu_model, usable_cores
from haversack.kernels.format import PackedFormat, PlaneFormat
from haversack.kernels.llvm import host_target

LEAST_GAIN = 0.05
"""Share of the first kernel's time that another must save to be chosen; and that more threads must save over fewer."""

CONTENDER_SECONDS, LEAST_TURNS, MOST_TURNS = 0.02, 5, 41
"""How long a contender is timed, and how often at least and at most."""


@dataclass(frozen=True)
class Choice:
    """The fastest kernel of a case by name, the most threads it should take (None: all there are, which were no slower), and
    what every contender took."""

    kernel: str
    threads: int | None
    microseconds: Mapping[str, float]


def case_key(fmt: PackedFormat | PlaneFormat, num_tokens: int, dtype: str, activation_bits: int) -> str:
    """One line of JSON that names a case; numbers of tokens up to the same power of two are one case."""
    tokens = 1 << max(0, num_tokens - 1).bit_length()
    facts = {"layout": type(fmt).__name__, **asdict(fmt), "tokens": tokens, "dtype": dtype, "bits_in": activation_bits}
    return json.dumps(facts, sort_keys=True)


def kept(key: str) -> Choice | None:
    """What was measured for a case on this machine, if anything was."""
    return _all_kept().get(key)


def keep(found: Mapping[str, Choice]) -> Path:
    """Add choices to this machine's file, replacing those of the same cases; a file that can't be written is done without."""
    path, choices = choices_file(), {**_all_kept(), **found}
    data = {"machine": machine_facts(), "choices": {key: asdict(choice) for key, choice in choices.items()}}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        with os.fdopen(handle, "w") as file:
            json.dump(data, file, indent=1)
        Path(partial).replace(path)
    forget()
    return path


def forget() -> None:
    """Read the file again when next asked."""
    _all_kept.cache_clear()


def choices_file() -> Path:
    """Beside the kernel cache, named after the machine."""
    facts = json.dumps(machine_facts(), sort_keys=True)
    return cache_folder("choices") / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"


def machine_facts() -> dict[str, Any]:
    """All that a choice depends on beside its case: brought to another machine or version, it means nothing."""
    target = host_target()
    versions = {name: metadata.version(name) for name in ("torch", "llvmlite")}
    return {
        "cpu": cpu_model(),
        "target": [target.cpu, target.features],
        "cores": usable_cores(),
        "versions": {"haversack": __version__, **versions},
    }


@cache
def _all_kept() -> dict[str, Choice]:
    """Empty where there is no file, it is damaged, or another machine's."""
    try:
        data = json.loads(choices_file().read_text())
        if data["machine"] != machine_facts():
            return {}
        return {
            str(key): Choice(str(row["kernel"]), _threads(row["threads"]), dict(row["microseconds"]))
            for key, row in data["choices"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _threads(kept: object) -> int | None:
    """A number of threads as kept; a TypeError or ValueError where it is none."""
    if kept is None:
        return None
    if not isinstance(kept, int) or kept < 1:
        raise ValueError(f"{kept} threads")
    return kept


def fastest(names: Sequence[str], run: Callable[[str, int, int], None], num_copies: int, threads: int) -> Choice:
    """The choice among kernels, the first of which is the one to beat; `run(name, threads, copy)` computes the case once.

    Kernels are compared with all threads; then the fewest threads that are about as fast as any are found for the winner.
    """
    times = _medians({name: partial(run, name, threads) for name in names}, num_copies)
    kernel = min(times, key=lambda name: (times[name], names.index(name)))
    if times[kernel] > (1 - LEAST_GAIN) * times[names[0]]:
        kernel = names[0]
    counts = list(_halved(threads))
    by_threads = _medians({str(n): partial(run, kernel, n) for n in counts}, num_copies)
    best = min(by_threads.values())
    fewest = min(n for n in counts if by_threads[str(n)] * (1 - LEAST_GAIN) <= best)
    listed = times | {f"{kernel}, {n} threads": by_threads[str(n)] for n in counts}
    taken = None if fewest == threads else fewest
    return Choice(kernel, taken, {name: round(1e6 * seconds, 1) for name, seconds in listed.items()})


def _halved(threads: int) -> Iterable[int]:
    """`threads`, and half as many down to one, rising."""
    counts = {threads}
    while threads > 1:
        threads //= 2
        counts.add(threads)
    return sorted(counts)


def _medians(contenders: Mapping[str, Callable[[int], None]], num_copies: int) -> dict[str, float]:
    """Median seconds of every contender, which take turns; the first turn, which compiles, is not counted."""
    for work in contenders.values():
        work(0)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(MOST_TURNS):
        for name, work in contenders.items():
            started = time.perf_counter()
            work(turn % num_copies)
            times[name].append(time.perf_counter() - started)
        if turn + 1 >= LEAST_TURNS and all(sum(each) >= CONTENDER_SECONDS for each in times.values()):
            break
    return {name: statistics.median(each) for name, each in times.items()}
