"""Measures this machine: `python -m haversack.describe.measure_machine --disk FOLDER` writes one JSON object per line,
`{"progress": ...}` for each step and at the end `{"rates": ..., "devices": [...]}`.

It runs in a process of its own, started by `machine.measured`, so that the memory it sweeps and the thread counts it
sets leave no trace in the caller's. Products' and disks' rates are the best of several repetitions: other processes can
only slow one down; memory's are medians (`memory_rates`). Memory is read by `torch.sum` over int64, which on a 2-core EPYC with one and two threads was as fast as an
unrolled AVX-512 loop made for the purpose through LLVM (31 against 28 and 35 against 34 GB/s) and as numpy's
reductions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil

from haversack.describe.machine import Rates, detect, usable_cores
from haversack.units import format_bytes

if TYPE_CHECKING:
    import torch

SWEEP_BYTES = 4 << 30
"""More than any cache holds (server parts reach 1 GiB of last-level cache)."""

DISK_BYTES = 1 << 30
BLOCK_BYTES = 8 << 20
"""One read request: large enough that its fixed cost (about 0.1 ms) is below a tenth even at 10 GB/s."""

DISK_READERS = 4
"""Requests in flight; one alone leaves an NVMe disk idle between requests."""

PIECE_SECONDS = 0.005
"""What one timed piece of work takes: well above starting threads (some 0.05 ms), about a scheduler's time slice."""

MAX_DISTURBANCE = 0.1
"""The share of the processor that others may take before the result says so."""

RUNTIME_IMPORTS = ("torch", "transformers", "haversack.engine.load", "haversack.cli.app")
"""What a process that runs a packed model has imported before it loads anything."""

_RUNTIME_PROBE = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
if "transformers" in sys.argv:  # its package imports nothing until a name is asked for
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.llama import modeling_llama
from haversack.describe.measure_machine import own_pages
print(json.dumps(own_pages()))
"""


def measure(
    disk_folder: Path,
    progress: Callable[[str], None],
    *,
    sweep_bytes: int = SWEEP_BYTES,
    disk_bytes: int = DISK_BYTES,
    seconds_per_rate: float = 1.0,
) -> dict[str, Any]:
    """`{"rates": Rates.to_dict(), "devices": [Device.to_dict(), ...]}`; smaller arguments are for tests."""
    notes: list[str] = []
    started = _CpuTimes.now()
    threads = thread_counts(usable_cores())
    progress("reading and copying memory")
    swept_bytes = affordable_sweep_bytes(detect().available_bytes, sweep_bytes)
    if swept_bytes < SWEEP_BYTES:
        notes.append(
            f"memory was swept over {format_bytes(swept_bytes)}, not {format_bytes(SWEEP_BYTES)}: "
            "too little is available, so caches may flatter the rate"
        )
    read, copied = memory_rates(swept_bytes, threads, seconds_per_rate)
    progress("multiplying matrices")
    matmul = matmul_rates(threads, seconds_per_rate, notes)
    progress("reading the disk")
    disk_rate, disk_method = disk_rates(disk_folder, disk_bytes, notes)
    if (share := _CpuTimes.now().others_share_since(started)) > MAX_DISTURBANCE:
        notes.append(
            f"other processes took {share:.0%} of the processor meanwhile, so rates are too low: "
            "measure again when idle"
        )
    progress("starting a fresh process")
    imports = tuple(name for name in RUNTIME_IMPORTS if is_there(name))
    notes += [f"{name} is not installed and was not imported" for name in RUNTIME_IMPORTS if name not in imports]
    private_bytes, file_bytes = runtime_pages(imports, notes)
    rates = Rates(
        read_bytes_per_second=read,
        copy_bytes_per_second=copied,
        matmul_flops_per_second=matmul,
        disk_read_bytes_per_second=disk_rate,
        disk_read_method=disk_method,
        runtime_private_bytes=private_bytes,
        runtime_file_bytes=file_bytes,
        runtime_imports=imports,
        swept_bytes=swept_bytes,
        source=f"measured on {datetime.date.today().isoformat()}",
        notes=tuple(notes),
    )
    return {"rates": rates.to_dict(), "devices": device_rates(progress)}


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4, ... and all cores."""
    powers = [2**i for i in range(cores.bit_length()) if 2**i < cores]
    return [*powers, cores]


def affordable_sweep_bytes(available_bytes: int, wanted_bytes: int) -> int:
    """At most half of what is available, in whole MiB: measuring must not push others out."""
    return max(1 << 20, min(wanted_bytes, available_bytes // 2) >> 20 << 20)


def memory_rates(
    swept_bytes: int, threads: list[int], seconds_per_rate: float
) -> tuple[dict[int, float], dict[int, float]]:
    """Bytes/s of reading `swept_bytes`, and of copying one half of them onto the other, by threads.

    The memory is swept piece by piece, again and again, and each piece's median time counts, so that neither a moment's
    disturbance nor a moment's speed decides: where a machine is shared, the fastest times were those of twice the rate
    that any run kept up. No cache holds a piece until the next sweep. Thread counts alternate.
    """
    import torch

    words = torch.empty(
        swept_bytes // 8, dtype=torch.int64
    )  # in pages as weights lie in: huge ones read a third faster
    words.fill_(1)  # untouched pages would all be the one zero page
    half = len(words) // 2
    pieces = words.split(_piece_words(words))
    copies = list(zip(words[:half].split(len(pieces[0])), words[half : 2 * half].split(len(pieces[0])), strict=True))
    reading: dict[int, list[list[float]]] = {count: [[] for _ in pieces] for count in threads}
    copying: dict[int, list[list[float]]] = {count: [[] for _ in copies] for count in threads}
    deadline = time.perf_counter() + 2 * seconds_per_rate * len(threads)
    while True:
        for count in threads:
            with _threads(count):
                for k, piece in enumerate(pieces):
                    reading[count][k].append(_seconds(piece.sum))
                for k, (target, source) in enumerate(copies):
                    copying[count][k].append(_seconds(partial(target.copy_, source)))
        if time.perf_counter() > deadline:
            break
    read = {count: swept_bytes / sum(map(median, times)) for count, times in reading.items()}
    return read, {count: half * 8 / sum(map(median, times)) for count, times in copying.items()}


def _piece_words(words: torch.Tensor) -> int:
    """Words that take about 5 ms with all cores: longer than starting threads, shorter than a scheduler's slice."""
    sample = words[: min(len(words), (256 << 20) // 8)]
    sample.sum()
    words_per_second = len(sample) / min(_seconds(sample.sum) for _ in range(5))
    return max(1, min(len(words) // 2, int(words_per_second * PIECE_SECONDS)))


def matmul_rates(threads: list[int], seconds_per_rate: float, notes: list[str]) -> dict[str, dict[int, float]]:
    """Operations/s (2 m n k) of square products by dtype and threads; a dtype that torch can't multiply is noted.

    The width doubles until a product takes `PIECE_SECONDS`, and the fastest product counts.
    """
    import torch

    def product(dtype: str, width: int) -> Callable[[], Any]:
        if dtype == "int8":
            a, b = (torch.randint(-127, 128, (width, width), dtype=torch.int8) for _ in range(2))
            return lambda: torch._int_mm(a, b)
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        x, y = (torch.randn(width, width).to(kind) for _ in range(2))
        return lambda: x @ y

    rates: dict[str, dict[int, float]] = {}
    for dtype in ("fp32", "bf16", "int8"):
        for count in threads:
            with _threads(count):
                try:
                    width = 256
                    while _best_seconds(product(dtype, width), 0) < PIECE_SECONDS and width < 8192:
                        width *= 2
                    seconds = _best_seconds(product(dtype, width), seconds_per_rate)
                except (RuntimeError, NotImplementedError, AttributeError) as error:
                    notes.append(f"{dtype} products were not measured: {str(error).splitlines()[0]}")
                    break
                rates.setdefault(dtype, {})[count] = 2 * width**3 / seconds
    return rates


def disk_rates(folder: Path, disk_bytes: int, notes: list[str]) -> tuple[float | None, str]:
    """Bytes/s of reading a file of random bytes in `folder`, `DISK_READERS` requests in flight, and how it was read.

    With O_DIRECT where the file system has it, else after the pages were dropped (`posix_fadvise`). What a hypervisor
    or a disk's own memory keeps can't be seen from here.
    """
    num_bytes = min(disk_bytes, psutil.disk_usage(str(folder)).free // 4) // BLOCK_BYTES * BLOCK_BYTES
    if num_bytes == 0:
        notes.append(f"the disk was not measured: {folder} has less than {format_bytes(4 * BLOCK_BYTES)} free")
        return None, ""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="disk-read-") as file:
        for _ in range(num_bytes // BLOCK_BYTES):
            file.write(os.urandom(BLOCK_BYTES))
        file.flush()
        os.fsync(file.fileno())
        rate, method = file_read_rate(Path(file.name), num_bytes)
    return rate, f"{method}, {DISK_READERS} requests of {BLOCK_BYTES >> 20} MiB in flight, in {folder}"


def file_read_rate(file: Path, num_bytes: int) -> tuple[float, str]:
    """Bytes/s of reading the first `num_bytes` of a file, whole blocks of them, past the page cache, and how it was read."""
    num_bytes = num_bytes // BLOCK_BYTES * BLOCK_BYTES
    fd, method = _open_uncached(str(file), num_bytes)
    try:
        return num_bytes / _seconds(lambda: _read_all(fd, num_bytes)), method
    finally:
        os.close(fd)


def runtime_pages(imports: tuple[str, ...], notes: list[str]) -> tuple[int, int] | tuple[None, None]:
    """(private bytes, file-backed bytes) of a fresh process after `imports`; noted where it can't import them."""
    command = [sys.executable, "-c", _RUNTIME_PROBE, *imports]
    probe = subprocess.run(command, capture_output=True, text=True)
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        notes.append(f"the runtime was not measured: importing {', '.join(imports)} failed with {reason}")
        return None, None
    private_bytes, file_bytes = json.loads(probe.stdout.splitlines()[-1])
    return private_bytes, file_bytes


def own_pages() -> tuple[int, int]:
    """(anonymous bytes, other resident bytes) of this process: what counts against a limit, and what can be evicted.

    From `/proc/self/smaps_rollup`, whose sums are exact where `VmRSS` lags behind by pages per thread; without it, all
    resident bytes count as private.
    """
    try:
        rows = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return psutil.Process().memory_info().rss, 0
    kib = {row.split(":")[0]: int(row.split()[1]) for row in rows}
    return kib["Anonymous"] * 1024, (kib["Rss"] - kib["Anonymous"]) * 1024


def device_rates(progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """`{"name", "read_bytes_per_second", "matmul_flops_per_second", "link_bytes_per_second"}` of each CUDA device."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        name = torch.cuda.get_device_name(index)
        progress(f"measuring {name}")
        free_bytes, _ = torch.cuda.mem_get_info(index)
        words = torch.ones(affordable_sweep_bytes(free_bytes, SWEEP_BYTES) // 8, dtype=torch.int64, device=device)
        host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(host, device=device)
        x, y = (torch.randn(8192, 8192, device=device) for _ in range(2))
        matmul = {}
        for dtype, kind in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
            a, b = x.to(kind), y.to(kind)
            matmul[dtype] = 2 * 8192**3 / _device_seconds(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        found.append(
            {
                "name": name,
                "read_bytes_per_second": len(words) * 8 / _device_seconds(words.sum),
                "matmul_flops_per_second": matmul,
                "link_bytes_per_second": len(host) / _device_seconds(lambda t=target, h=host: t.copy_(h)),  # type: ignore[misc]
                "source": f"measured on {datetime.date.today().isoformat()}",
            }
        )
        del words, host, target, x, y, a, b
        torch.cuda.empty_cache()
    return found


def _device_seconds(work: Callable[[], Any]) -> float:
    """The fastest of ten runs after a warm-up, by the device's own clock."""
    import torch

    work()
    times = []
    for _ in range(10):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return min(times)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _CpuTimes:
    """Seconds that all processes, this one, and the clock have used so far."""

    busy: float
    own: float
    clock: float

    @classmethod
    def now(cls) -> _CpuTimes:
        total, own = psutil.cpu_times(), psutil.Process().cpu_times()
        return cls(sum(total) - total.idle - getattr(total, "iowait", 0), own.user + own.system, time.perf_counter())

    def others_share_since(self, before: _CpuTimes) -> float:
        """Processor time of others over what all cores had to give."""
        others = (self.busy - before.busy) - (self.own - before.own)
        return others / ((self.clock - before.clock) * (os.cpu_count() or 1))


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _best_seconds(work: Callable[[], Any], for_seconds: float) -> float:
    """The fastest run among those that fit into `for_seconds`, at least two."""
    started = time.perf_counter()
    times = [_seconds(work), _seconds(work)]
    while time.perf_counter() - started < for_seconds:
        times.append(_seconds(work))
    return min(times)


def _open_uncached(path: str, num_bytes: int) -> tuple[int, str]:
    if hasattr(os, "O_DIRECT"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            os.preadv(fd, [mmap.mmap(-1, 4096)], 0)
            return fd, "O_DIRECT"
        except OSError:
            pass  # tmpfs and some network file systems refuse it, on opening or on the first read
    fd = os.open(path, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, num_bytes, os.POSIX_FADV_DONTNEED)
        return fd, "read after posix_fadvise(DONTNEED)"
    return fd, "read, possibly from the page cache"


def _read_all(fd: int, num_bytes: int) -> None:
    def read(first: int) -> None:
        buffer = mmap.mmap(
            -1, BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )  # page-aligned, as O_DIRECT wants
        if hasattr(mmap, "MADV_HUGEPAGE"):
            buffer.madvise(mmap.MADV_HUGEPAGE)  # as the stream window's buffers: scattered pages cut requests up
        for offset in range(first * BLOCK_BYTES, num_bytes, DISK_READERS * BLOCK_BYTES):
            os.preadv(fd, [buffer], offset)

    with ThreadPoolExecutor(DISK_READERS) as pool:
        list(pool.map(read, range(DISK_READERS)))


def is_there(name: str) -> bool:
    """Whether a module could be imported."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--disk", type=Path, default=Path.cwd())
    _say(measure(parser.parse_args().disk, lambda line: _say({"progress": line})))
