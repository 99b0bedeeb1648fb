"""Stored tensors brought into a tier: resident in private memory, or mapped from their file.

*Resident* tensors are private, 64-byte aligned (torch's own allocation, one storage each, so that the allocator's
reports are the declared bytes), and read past the page cache. *Mapped* tensors are the file's own pages: nothing is
copied, the system may evict them, and a budget counts them on a line of their own. Streaming from disk is
`engine/streaming.py`.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from haversack.describe.checkpoint import CheckpointTensor, torch_dtype
from haversack.errors import CheckpointError
from haversack.formats.safetensors_file import PIECE_BYTES, drop_pages
from haversack.ledger import DTYPE_BYTES

if TYPE_CHECKING:
    import torch


def read_resident(
    tensors: Iterable[CheckpointTensor], progress: Callable[[int], None] | None = None
) -> dict[str, torch.Tensor]:
    """Tensors in private memory by name, each a storage of exactly its bytes.

    Peak: the tensors themselves and nothing more; read pages are dropped from the page cache piece by piece, so that a
    cgroup is not charged twice. `progress` is called with the bytes read since the last call. Raises CheckpointError if
    a file ends early.
    """
    rows = list(tensors)
    room = resident_room(rows)
    fill_resident(rows, room, progress)
    return room


def resident_room(tensors: Iterable[CheckpointTensor]) -> dict[str, torch.Tensor]:
    """Storages for tensors that will be read, by name: no page of them is touched yet."""
    import torch

    return {tensor.name: torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype)) for tensor in tensors}


def fill_resident(
    tensors: Iterable[CheckpointTensor], room: Mapping[str, torch.Tensor], progress: Callable[[int], None] | None = None
) -> None:
    """Read tensors into their room, in the order in which they lie. Allocates nothing, so that it may run in any thread."""
    import torch

    by_file: dict[Path, list[CheckpointTensor]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    for file, rows in by_file.items():
        fd = _open(file)
        try:
            for row in sorted(rows, key=lambda row: row.start):
                _fill(fd, row, memoryview(room[row.name].reshape(-1).view(torch.uint8).numpy().data), progress)
        finally:
            os.close(fd)


def map_file(tensors: Iterable[CheckpointTensor]) -> dict[str, torch.Tensor]:
    """Tensors over a read-only map of their files, by name; zero private bytes.

    They must never be written to: the pages are protected, and a write ends the process. (Private writable pages would
    be safe to write, but count against `RLIMIT_DATA` in full.) Raises CheckpointError if a file is shorter than its
    header said, or a tensor starts between elements.
    """
    import torch

    maps: dict[Path, mmap.mmap] = {}
    mapped: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        if tensor.num_bytes == 0:
            mapped[tensor.name] = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
            continue
        check_element_aligned(tensor)
        if tensor.file not in maps:
            fd = _open(tensor.file)
            try:
                maps[tensor.file] = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
            finally:
                os.close(fd)
        if tensor.stop > len(maps[tensor.file]):
            raise cut_short(tensor)
        count = tensor.num_bytes // DTYPE_BYTES[tensor.dtype]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(
                maps[tensor.file], dtype=torch_dtype(tensor.dtype), count=count, offset=tensor.start
            )
        mapped[tensor.name] = flat.reshape(tensor.shape)
    return mapped


def check_element_aligned(tensor: CheckpointTensor) -> None:
    """Raise CheckpointError for a tensor that can't be used where it lies, because it starts between elements."""
    element_bytes = DTYPE_BYTES[tensor.dtype]
    if tensor.start % element_bytes:
        raise CheckpointError(
            f"tensor {tensor.name!r} starts at byte {tensor.start} of {tensor.file}, which is no multiple of its "
            f"{element_bytes}-byte elements; load it resident, or save the file again."
        )


def cut_short(tensor: CheckpointTensor) -> CheckpointError:
    """The error for a file that lost bytes after its header was read."""
    return CheckpointError(
        f"{tensor.file} ends inside tensor {tensor.name!r}, which should end at byte {tensor.stop}; "
        "the file was cut after it was opened: pack or fetch it again."
    )


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror}.") from None


def _fill(fd: int, tensor: CheckpointTensor, target: memoryview, progress: Callable[[int], None] | None) -> None:
    position = 0
    while position < len(target):
        got = os.preadv(fd, [target[position : position + PIECE_BYTES]], tensor.start + position)
        if got == 0:
            raise cut_short(tensor)
        drop_pages(fd, tensor.start + position, got)
        position += got
        if progress is not None:
            progress(got)
