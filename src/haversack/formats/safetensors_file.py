"""Safetensors files tensor by tensor: declared first, written in any order, resumed after a kill, read by offset.

The format is 8 bytes of header length, a JSON header, then data without holes (readers refuse holes, spans longer than
the tensor and trailing bytes). So that mapped and streamed tensors are aligned without padding tensors, the header is
padded with spaces until data starts at a multiple of 64, and tensors are ordered by the largest power of two (up to 64)
that divides their bytes, largest first: every tensor then starts at a multiple of that power, and all whose bytes are a
multiple of 64, which packed codes nearly always are, at a multiple of 64.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haversack.describe.checkpoint import MAX_HEADER_BYTES, CheckpointTensor, dtype_name, torch_dtype
from haversack.errors import CheckpointError, OutputError
from haversack.ledger import StoredTensor
from haversack.units import format_bytes

if TYPE_CHECKING:
    import torch

ALIGNMENT_BYTES = 64
"""A cache line, and the widest vector register: what kernels want tensors to start at."""

PIECE_BYTES = 8 << 20
"""Copying and hashing go piece by piece, so that no tensor is held twice."""


def file_order(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """The order that aligns every start as far as its bytes allow; declared order within equal alignment."""
    return sorted(tensors, key=lambda tensor: -_alignment(tensor.num_bytes))


def layout(
    path: str | Path, tensors: Iterable[StoredTensor], metadata: Mapping[str, str] | None = None
) -> tuple[dict[str, CheckpointTensor], bytes]:
    """Where each tensor of a file will lie, in file order, and its length prefix and header; nothing is written."""
    ordered = file_order(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in ordered:
        assert tensor.name not in header, f"tensor {tensor.name!r} is declared twice"
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.num_bytes],
        }
        position += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise OutputError(f"a header of {len(text)} bytes is longer than readers accept; use smaller shards.")
    prefix = struct.pack("<Q", len(text)) + text
    spans = {}
    for tensor in ordered:
        start, stop = (len(prefix) + offset for offset in header[tensor.name]["data_offsets"])
        spans[tensor.name] = CheckpointTensor(tensor.name, Path(path), tensor.dtype, tensor.shape, start, stop)
    return spans, prefix


def total_file_bytes(tensors: Iterable[StoredTensor], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes of the file that a writer would make, header included."""
    spans, header = layout("", tensors, metadata)
    return len(header) + sum(span.num_bytes for span in spans.values())


def shards(tensors: Iterable[StoredTensor], max_shard_bytes: int) -> list[list[StoredTensor]]:
    """Tensors in declared order, cut before `max_shard_bytes` is exceeded; a larger tensor has its own shard."""
    cut: list[list[StoredTensor]] = []
    held_bytes = 0
    for tensor in tensors:
        if not cut or held_bytes + tensor.num_bytes > max_shard_bytes:
            cut.append([])
            held_bytes = 0
        cut[-1].append(tensor)
        held_bytes += tensor.num_bytes
    return cut


class SafetensorsWriter:
    """Writes one file whose tensors are declared beforehand, each at its place, in any order, and resumes.

    The file is preallocated, so that a full disk is known before anything is computed. Beside it, `path` + `.journal`
    gets a line with the hash of each finished tensor; a writer opened again with the same declaration re-hashes those,
    keeps what is intact (`finished`), and forgets the rest. With another declaration it starts over. The journal stays
    until `remove_journal`, so that the caller decides when a file counts as done.

    Host memory: one piece of 8 MiB when resuming, none beyond the tensors handed in otherwise. Raises OutputError if
    the disk is full or read-only.
    """

    def __init__(self, path: str | Path, tensors: Iterable[StoredTensor], *, metadata: Mapping[str, str] | None = None):
        self.path = Path(path)
        self.journal_path = journal_path(self.path)
        self.spans, self._header = layout(path, tensors, metadata)
        self.file_bytes = len(self._header) + sum(span.num_bytes for span in self.spans.values())
        self._hashes: dict[str, str] = {}
        self._fd = self._journal = -1
        with explained(self.path, self.file_bytes):
            if not self._resume():
                self._start()

    @property
    def finished(self) -> frozenset[str]:
        """Names of tensors that are written."""
        return frozenset(self._hashes)

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of tensors still to write, in file order."""
        return tuple(name for name in self.spans if name not in self._hashes)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, which must have the declared dtype and shape."""
        import torch

        span = self.spans[name]
        if tensor.dtype != torch_dtype(span.dtype) or tuple(tensor.shape) != span.shape:
            raise ValueError(
                f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, but was declared {span.dtype} {span.shape}"
            )
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        self.write_pieces(name, [raw.data])

    def write_pieces(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write a tensor's bytes piece by piece (a copy from another file need not be held whole)."""
        span = self.spans[name]
        digest = hashlib.sha256()
        position = 0
        for piece in pieces:
            if position + len(piece) > span.num_bytes:
                raise ValueError(f"tensor {name!r} got more than its {span.num_bytes} bytes")
            digest.update(piece)
            with explained(self.path, span.num_bytes):
                _write_all(self._fd, piece, span.start + position)
            position += len(piece)
        if position != span.num_bytes:
            raise ValueError(f"tensor {name!r} got {position} of its {span.num_bytes} bytes")
        self._hashes[name] = digest.hexdigest()
        with explained(self.path, span.num_bytes):
            os.write(self._journal, _journal_line({"tensor": name, "sha256": self._hashes[name]}))

    def finish(self) -> dict[str, str]:
        """Flush everything to disk and close; the SHA-256 of each tensor. Every declared tensor must be written."""
        assert not self.missing, f"{len(self.missing)} tensors were never written, first {self.missing[0]!r}"
        with explained(self.path, self.file_bytes):
            os.fsync(self._fd)
        self.close()
        return {name: self._hashes[name] for name in self.spans}

    def remove_journal(self) -> None:
        """Forget that this file was ever unfinished."""
        self.journal_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close without finishing; opening again resumes."""
        for fd in (self._fd, self._journal):
            if fd >= 0:
                os.close(fd)
        self._fd = self._journal = -1

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> None:
        self.journal_path.unlink(missing_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            _preallocate(self._fd, self.file_bytes)
            os.pwrite(self._fd, self._header, 0)
            # The journal's first line comes after the header, so that a journal always belongs to a whole header.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._journal = os.open(self.journal_path, flags, 0o666)
            os.write(self._journal, _journal_line({"header_sha256": hashlib.sha256(self._header).hexdigest()}))
        except OSError:
            self.close()
            self.path.unlink(missing_ok=True)
            self.journal_path.unlink(missing_ok=True)
            raise

    def _resume(self) -> bool:
        """Open what an earlier writer left; False where there is nothing that fits this declaration."""
        rows = _read_journal(self.journal_path)
        if not rows or rows[0].get("header_sha256") != hashlib.sha256(self._header).hexdigest():
            return False
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        same_bytes = os.fstat(self._fd).st_size == self.file_bytes
        if not same_bytes or os.pread(self._fd, len(self._header), 0) != self._header:
            self.close()
            return False
        written = {row["tensor"]: row["sha256"] for row in rows[1:] if "tensor" in row and "sha256" in row}
        self._hashes = {
            name: sha256
            for name, sha256 in written.items()
            if name in self.spans and _hash_span(self._fd, self.spans[name]) == sha256
        }
        # Rewritten whole and renamed: a line that a kill cut short would otherwise join the next one.
        fresh = self.journal_path.with_name(self.journal_path.name + ".new")
        lines = [rows[0], *({"tensor": name, "sha256": sha256} for name, sha256 in self._hashes.items())]
        fresh.write_bytes(b"".join(map(_journal_line, lines)))
        fresh.replace(self.journal_path)
        self._journal = os.open(self.journal_path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        return True


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Write tensors that are all there as one file, one at a time; the SHA-256 of each. Raises OutputError."""
    declared = [StoredTensor(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
    with SafetensorsWriter(path, declared, metadata=metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        hashes = writer.finish()
        writer.remove_journal()
    return hashes


def journal_path(path: Path) -> Path:
    """Where the writer of `path` notes what is finished."""
    return path.with_name(path.name + ".journal")


def hash_tensors(spans: Iterable[CheckpointTensor]) -> Iterator[tuple[str, str]]:
    """(name, SHA-256 of its bytes) of each tensor, read past the page cache's needs (pages are dropped again)."""
    by_file: dict[Path, list[CheckpointTensor]] = {}
    for span in spans:
        by_file.setdefault(span.file, []).append(span)
    for file, rows in by_file.items():
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for span in rows:
                yield span.name, _hash_span(fd, span)
        finally:
            os.close(fd)


def read_pieces(span: CheckpointTensor) -> Iterator[memoryview]:
    """A tensor's bytes; each piece is valid until the next. Raises CheckpointError if the file is cut."""
    buffer = memoryview(bytearray(min(PIECE_BYTES, max(span.num_bytes, 1))))
    with span.file.open("rb", buffering=0) as file:
        position = 0
        while position < span.num_bytes:
            room = buffer[: min(len(buffer), span.num_bytes - position)]
            got = os.preadv(file.fileno(), [room], span.start + position)
            if got == 0:
                raise CheckpointError(f"{span.file} ends inside tensor {span.name!r}; it was cut after it was opened.")
            yield room[:got]
            position += got


def _alignment(num_bytes: int) -> int:
    return min(ALIGNMENT_BYTES, num_bytes & -num_bytes) if num_bytes else ALIGNMENT_BYTES


def _preallocate(fd: int, num_bytes: int) -> None:
    """Reserve disk for the whole file now; file systems that can't reserve get a sparse file of the right length."""
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(fd, 0, num_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
    return os.ftruncate(fd, num_bytes)


def _write_all(fd: int, piece: bytes | memoryview, offset: int) -> None:
    view = memoryview(piece)
    while len(view):
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]


def _hash_span(fd: int, span: CheckpointTensor) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(PIECE_BYTES, max(span.num_bytes, 1))))
    position = 0
    while position < span.num_bytes:
        got = os.preadv(fd, [buffer[: span.num_bytes - position]], span.start + position)
        if got == 0:
            return "cut short"
        digest.update(buffer[:got])
        position += got
    drop_pages(fd, span.start, span.num_bytes)
    return digest.hexdigest()


def drop_pages(fd: int, offset: int, num_bytes: int) -> None:
    """Ask the kernel to forget clean pages of this range, where the system has such a call."""
    if hasattr(os, "posix_fadvise") and num_bytes:
        os.posix_fadvise(fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)


def _journal_line(row: Mapping[str, str]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _read_journal(path: Path) -> list[dict[str, str]]:
    """Whole lines only: a kill may cut the last one."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


@contextmanager
def explained(path: Path, num_bytes: int, *, resumable: bool = True) -> Iterator[None]:
    """Turn the system's refusals to write `num_bytes` to `path` into one sentence (OutputError); whether what was written
    before is kept and gone on with."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise _output_error(path, error, num_bytes, resumable) from None


def _output_error(path: Path, error: OSError, num_bytes: int, resumable: bool) -> OutputError:
    """What to tell the user when `num_bytes` can't be written to `path`."""
    folder = path.parent
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        stats = os.statvfs(folder)
        free = format_bytes(stats.f_bavail * stats.f_frsize)
        again = ", then run again to resume" if resumable else ""
        return OutputError(
            f"{path} needs {format_bytes(num_bytes)}, but {folder} has {free} free; "
            f"free some space or choose another output{again}."
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return OutputError(f"{path} can't be written: {folder} is read-only for this user; choose another output.")
    return OutputError(f"{path} can't be written: {error.strerror or error}.")
