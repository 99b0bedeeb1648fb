"""What the operating system says this process holds, and the limits it can be put under.

Anonymous (private) pages and file-backed ones are told apart: only the first must stay in memory.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

from haversack.errors import UsageError
from haversack.units import format_bytes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
THRESHOLD_BYTES = 256 * 1024
"""Blocks from this size are mapped and unmapped one by one. With glibc's own, growing thresholds a process keeps 14 to
34% more than it uses."""


def return_freed_memory() -> bool:
    """Make glibc give freed blocks back at once; whether that worked (other C libraries have no such knob)."""
    try:
        libc = ctypes.CDLL(None)
        return bool(
            libc.mallopt(_M_MMAP_THRESHOLD, THRESHOLD_BYTES) and libc.mallopt(_M_TRIM_THRESHOLD, THRESHOLD_BYTES)
        )
    except (OSError, AttributeError):
        return False


def private_bytes() -> int:
    """Anonymous pages resident now."""
    return _status("RssAnon")


def file_bytes() -> int:
    """File-backed pages resident now: mapped weights, libraries; evictable."""
    return _status("RssFile")


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def set_cap(cap_bytes: int, *, needed_bytes: int = 0) -> None:
    """Put this process under a hard limit of private memory (`RLIMIT_DATA`); an allocation beyond it fails.

    Raises UsageError if what the process holds and `needed_bytes` more pass the limit already.
    """
    import resource

    used = _status("VmData")
    if used + needed_bytes > cap_bytes:
        raise UsageError(
            f"a cap of {format_bytes(cap_bytes)} was asked, but this process holds {format_bytes(used)} before anything is "
            f"loaded, and the model takes {format_bytes(needed_bytes)} more; allow {format_bytes(used + needed_bytes)} and "
            "what the prompt needs."
        )
    resource.setrlimit(resource.RLIMIT_DATA, (cap_bytes, cap_bytes))


_SIGNS_OF_EXHAUSTION = ("alloc", "memory", "failed to map", "start new thread")
"""Words of torch's allocator, the dynamic loader and Python's threads when a limit is hit."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(words in message for words in _SIGNS_OF_EXHAUSTION)


class PeakSampler:
    """The most private bytes seen, sampled every 2 ms by a thread of its own while the block runs.

    On a busy machine such a thread sleeps through short peaks. With `files_stay` (no file is mapped and given up meanwhile) the kernel's own
    high-water mark counts as well, less the file-backed pages there are at the end.
    """

    def __init__(self, interval_seconds: float = 0.002, *, files_stay: bool = False):
        self.peak_bytes = private_bytes()
        self._has_mark = files_stay and _reset_high_water_mark()
        self._interval = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self.peak_bytes = max(self.peak_bytes, private_bytes())

    def __enter__(self) -> PeakSampler:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()

    def finish(self) -> int:
        """Stop sampling; the peak."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            marked = _status("VmHWM") - _status("RssFile") - _status("RssShmem") if self._has_mark else 0
            self.peak_bytes = max(self.peak_bytes, private_bytes(), marked)
        return self.peak_bytes
