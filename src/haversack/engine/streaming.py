"""Layers streamed from disk through a window of few buffers, read ahead while the present layer computes.

The window holds `num_buffers` buffers, each as large as the largest layer. A reader thread fills the buffer that is
free with the layer that comes next, wrapping around from the last layer to the first, so that between two tokens the
first layers are already there. Reads bypass the page cache (O_DIRECT) where the file system allows, else the pages are
dropped after reading: what carries the speed is the window, and its bytes are all the bytes there are. Several requests
are in flight at once; one alone leaves a fast disk idle.

Driven by a module's forward hooks: `acquire(layer)` before it, `release(layer)` after it.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from haversack.describe.checkpoint import CheckpointTensor, torch_dtype
from haversack.errors import CheckpointError, HaversackError
from haversack.formats.huge_pages import on_huge_pages
from haversack.formats.safetensors_file import drop_pages
from haversack.formats.tiers import check_element_aligned, cut_short
from haversack.ledger import StoredTensor

PAGE_BYTES = 4096
"""What O_DIRECT aligns offsets, lengths and addresses to, on every file system we know."""

PIECE_BYTES = 8 << 20
"""One read request, as in the disk measurement that predictions use."""

NUM_READERS = 4
"""Requests in flight, as in the disk measurement."""


@dataclass(frozen=True)
class StreamStatistics:
    """What streaming did so far. `stall_seconds` is what `acquire` waited for reads, `read_seconds` what reads took."""

    num_reads: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    stall_seconds: float = 0.0

    @property
    def bytes_per_second(self) -> float | None:
        """What the disk gave while it was asked; None before the first read."""
        return self.bytes_read / self.read_seconds if self.read_seconds else None


@dataclass(frozen=True)
class _Run:
    """Bytes `[start, stop)` of a file, page-aligned, that go to `offset` of a buffer; `last` is the tensor at its end."""

    file: Path
    start: int
    stop: int
    offset: int
    last: CheckpointTensor


def window_tensors(groups: Sequence[Sequence[CheckpointTensor]], num_buffers: int = 2) -> tuple[StoredTensor, ...]:
    """What a window over these layers allocates, to the byte: known before any file exists (`layout` gives the tensors).

    Each buffer takes the largest layer's runs in whole pages, and one page to align its start.
    """
    num_bytes = max((_placed(group)[2] for group in groups), default=0) + PAGE_BYTES
    return tuple(StoredTensor(f"window{i}", "U8", (num_bytes,)) for i in range(min(num_buffers, len(groups))))


class StreamWindow:
    """Tensors of `groups` (one per layer, in the order they are used), at most `num_buffers` groups at a time.

    Layers must be acquired in order, wrapping around; acquiring another one (a new sequence after a broken one) costs a
    stall. Where all groups fit into the buffers each is read once and kept. Tensors of a group are valid between its
    `acquire` and its `release`, and must not be written to. One thread acquires; the reader is a thread of its own.

    Raises CheckpointError on `acquire` if a file can't be read or was cut.
    """

    def __init__(self, groups: Sequence[Sequence[CheckpointTensor]], num_buffers: int = 2, *, direct: bool = True):
        assert num_buffers >= 1 and groups, "a window needs a buffer and a layer"
        for group in groups:
            for tensor in group:
                check_element_aligned(tensor)
        self.groups = tuple(tuple(group) for group in groups)
        self.declared = window_tensors(groups, num_buffers)
        self._placed = [_placed(group) for group in self.groups]
        self._files: dict[Path, tuple[int, bool]] = {}
        try:
            for file in dict.fromkeys(tensor.file for group in self.groups for tensor in group):
                self._files[file] = _open(file, direct)
        except OSError as error:
            self._close_files()
            raise CheckpointError(f"{error.filename} can't be read: {error.strerror}.") from None
        self._buffers = [_aligned(declared.num_bytes) for declared in self.declared]
        self._views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        # Reads and uses are numbered; number s is group s % groups in buffer s % buffers.
        self._next_read = 0
        self._next_use = 0
        self._reading: int | None = None
        self._holder: list[int | None] = [None] * len(self._buffers)  # the number whose group a buffer holds or awaits
        self._content: list[int | None] = [None] * len(self._buffers)  # the group that a buffer holds whole
        self._acquired: dict[int, int] = {}  # group -> number
        self._failure: HaversackError | None = None
        self._closed = False
        self._statistics = StreamStatistics()
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="haversack-read")
        self._thread = threading.Thread(target=self._read_ahead, name="haversack-stream", daemon=True)
        self._thread.start()

    @property
    def window_bytes(self) -> int:
        """Private bytes of all buffers; allocated and touched when the window is made, and never more."""
        return sum(tensor.num_bytes for tensor in self.declared)

    @property
    def is_direct(self) -> bool:
        """Whether every file is read with O_DIRECT."""
        return all(direct for _, direct in self._files.values())

    @property
    def statistics(self) -> StreamStatistics:
        with self._changed:
            return self._statistics

    def acquire(self, group: int) -> dict[str, torch.Tensor]:
        """The tensors of a group by name, once they are read. Acquiring a group twice returns the same tensors."""
        started = time.perf_counter()
        with self._changed:
            self._check_open()
            if group in self._acquired:
                number = self._acquired[group]
                return self._tensors(group, number % len(self._buffers))
            if self._next_use % len(self.groups) != group:
                self._turn_to(group)
            number = self._next_use
            buffer = number % len(self._buffers)
            if self._holder[buffer] in self._acquired.values():
                held = ", ".join(map(str, sorted(self._acquired)))
                raise RuntimeError(f"group {group} was acquired while the window's buffers hold {held}: release first")
            while not (self._holder[buffer] == number and self._reading != number):
                self._changed.wait()
                self._check_open()
            self._next_use += 1
            self._acquired[group] = number
            waited = time.perf_counter() - started
            self._statistics = replace(self._statistics, stall_seconds=self._statistics.stall_seconds + waited)
            return self._tensors(group, buffer)

    def release(self, group: int) -> None:
        """Give a group's buffer back to the reader; its tensors are invalid from now on."""
        with self._changed:
            number = self._acquired.pop(group, None)
            if number is not None:
                self._holder[number % len(self._buffers)] = None
                self._changed.notify_all()

    def release_all(self) -> None:
        """Release whatever is acquired: after a forward pass that was broken off by an exception."""
        for group in tuple(self._acquired):
            self.release(group)

    def close(self) -> None:
        """Stop reading, close files and free the buffers. Waits for the requests in flight."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._pool.shutdown()
        self._close_files()
        self._views.clear()
        self._buffers.clear()

    def __enter__(self) -> StreamWindow:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise RuntimeError("the window is closed")

    def _turn_to(self, group: int) -> None:
        """Forget what was read ahead and go on reading at `group`. Waits for the read in progress."""
        while self._reading is not None:
            self._changed.wait()
            self._check_open()
        acquired = set(self._acquired.values())
        self._holder = [number if number in acquired else None for number in self._holder]
        ahead = (group - self._next_read) % len(self.groups)
        self._next_read = self._next_use = self._next_read + ahead
        self._changed.notify_all()

    def _read_ahead(self) -> None:
        while True:
            with self._changed:
                while not self._closed and self._holder[self._next_read % len(self._buffers)] is not None:
                    self._changed.wait()
                if self._closed:
                    return
                number = self._next_read
                buffer, group = number % len(self._buffers), number % len(self.groups)
                self._next_read += 1
                self._holder[buffer] = self._reading = number
                is_there = self._content[buffer] == group
                self._content[buffer] = None
            failure: HaversackError | None = None
            num_bytes, started = 0, time.perf_counter()
            try:
                num_bytes = 0 if is_there else self._read(group, self._buffers[buffer])
            except HaversackError as error:
                failure = error
            except (OSError, RuntimeError) as error:  # RuntimeError: the interpreter is going down
                failure = CheckpointError(f"streaming layer {group} failed: {error}.")
            with self._changed:
                self._reading, self._failure = None, failure
                self._content[buffer] = None if failure else group
                if num_bytes:
                    self._statistics = replace(
                        self._statistics,
                        num_reads=self._statistics.num_reads + 1,
                        bytes_read=self._statistics.bytes_read + num_bytes,
                        read_seconds=self._statistics.read_seconds + time.perf_counter() - started,
                    )
                self._changed.notify_all()
                if failure:
                    return

    def _read(self, group: int, buffer: torch.Tensor) -> int:
        """Fill a buffer with a group; the bytes read."""
        memory = memoryview(buffer.numpy().data)
        requests = []
        for run in self._placed[group][1]:
            for start in range(run.start, run.stop, PIECE_BYTES):
                stop = min(start + PIECE_BYTES, run.stop)
                offset = run.offset + start - run.start
                requests.append((run, start, memory[offset : offset + stop - start]))
        return sum(self._pool.map(self._request, *zip(*requests, strict=True)))

    def _request(self, run: _Run, start: int, target: memoryview) -> int:
        fd, direct = self._files[run.file]
        wanted = min(len(target), run.last.stop - start)  # the last page of a file may be short
        done = 0
        while done < wanted:
            got = os.preadv(fd, [target[done:]], start + done)
            done += got
            if got == 0 or (direct and done % PAGE_BYTES and done < wanted):
                raise cut_short(run.last)
        if not direct:
            drop_pages(fd, start, done)
        return done

    def _tensors(self, group: int, buffer: int) -> dict[str, torch.Tensor]:
        if (group, buffer) not in self._views:
            offsets = self._placed[group][0]
            self._views[group, buffer] = {
                tensor.name: self._buffers[buffer][offset : offset + tensor.num_bytes]
                .view(torch_dtype(tensor.dtype))
                .reshape(tensor.shape)
                for tensor, offset in zip(self.groups[group], offsets, strict=True)
            }
        return dict(self._views[group, buffer])

    def _close_files(self) -> None:
        for fd, _ in self._files.values():
            os.close(fd)
        self._files.clear()


def _placed(group: Sequence[CheckpointTensor]) -> tuple[list[int], list[_Run], int]:
    """Where each tensor of a group lies in a buffer, the runs that bring it there, and the bytes they take.

    Runs start and end on pages, and lie on pages of the buffer, so that a tensor keeps the alignment it has in its
    file. What touches or shares a page is one run: packed folders keep a layer's tensors together.
    """
    order = sorted((i for i in range(len(group)) if group[i].num_bytes), key=lambda i: (group[i].file, group[i].start))
    offsets = [0] * len(group)
    runs: list[_Run] = []
    used = 0
    for i in order:
        tensor = group[i]
        stop = -(-tensor.stop // PAGE_BYTES) * PAGE_BYTES
        if runs and runs[-1].file == tensor.file and tensor.start <= runs[-1].stop:
            runs[-1] = replace(runs[-1], stop=max(stop, runs[-1].stop), last=tensor)
        else:
            runs.append(_Run(tensor.file, tensor.start // PAGE_BYTES * PAGE_BYTES, stop, used, tensor))
        offsets[i] = runs[-1].offset + tensor.start - runs[-1].start
        used = runs[-1].offset + runs[-1].stop - runs[-1].start
    return offsets, runs, used


def _aligned(num_bytes: int) -> torch.Tensor:
    """`num_bytes` less one page, from a page's start, within an allocation of `num_bytes`; touched."""
    whole = on_huge_pages(torch.empty(num_bytes, dtype=torch.uint8)).fill_(
        0
    )  # touched now: the peak shows when planned
    skip = -whole.data_ptr() % PAGE_BYTES
    return whole[skip : skip + num_bytes - PAGE_BYTES]


def _open(file: Path, direct: bool) -> tuple[int, bool]:
    """(file descriptor, whether it reads directly)."""
    if direct and hasattr(os, "O_DIRECT"):
        try:
            fd = os.open(file, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError:
            pass  # tmpfs and some network file systems refuse it on opening
        else:
            try:
                os.preadv(fd, [mmap.mmap(-1, PAGE_BYTES)], 0)
                return fd, True
            except OSError:
                os.close(fd)  # others refuse the first read
    return os.open(file, os.O_RDONLY | os.O_CLOEXEC), False
