"""Output paths, checked before work begins and written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from haversack.errors import OutputError
from haversack.formats.safetensors_file import explained


def check_output(path: str | Path) -> None:
    """Raise OutputError now for an output file or folder that could not be written after minutes of work.

    Its folder must exist or be one that can be made; whether the disk has room shows when it is reserved.
    """
    path = Path(path)
    folder = path.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"{path} can't be written: {folder} is a file, not a folder; choose another output.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path} can't be written: {folder} is read-only for this user; choose another output.")


def check_output_file(path: str | Path) -> None:
    """Like `check_output`, for what must not be a folder."""
    if Path(path).is_dir():
        raise OutputError(f"{path} is a folder, but a file is to be written; name a file, say {Path(path) / 'NAME'}.")
    check_output(path)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file through a `.partial` beside it, making its folder; an older file stays until the new one is
    whole. Raises OutputError."""
    path = Path(path)
    check_output_file(path)
    partial = path.with_name(path.name + ".partial")
    data = text.encode()
    with explained(path, len(data), resumable=False):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            partial.replace(path)
        except OSError:
            if partial.is_file():
                partial.unlink()
            raise


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's names: what was renamed into it stays after a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
