"""Rows of training data as they lie in files: text, JSON lines and parquet, read as a stream; a bad row is named, never fatal.

Text gives pieces of one document per file, cut at line ends. JSON lines and parquet give one mapping per row.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haversack.errors import CheckpointError, MissingDependencyError, UsageError

JSON_SUFFIXES, PARQUET_SUFFIXES = (".jsonl", ".ndjson"), (".parquet",)
PIECE_BYTES = 1 << 16
"""Text is read, decoded and made into tokens in pieces of about this many bytes, each ending where a line ends."""

MAX_LINE_BYTES = 64 << 20
"""A line longer than this is no row of text."""

PARQUET_BATCH_ROWS = 256


class DataError(CheckpointError):
    """Training data that can't be used at all: missing, empty, binary, or without one good row."""


@dataclass(frozen=True)
class Row:
    """One row: where it is (`number` from 1: line of a text or JSON-lines file, row of a parquet file), and what it holds:
    text, or a mapping by field. `ends` says that a document ends with it."""

    file: str
    number: int
    value: str | dict[str, Any]
    ends: bool = True


@dataclass(frozen=True)
class BadRow:
    """A row that can't be used, and why, in one sentence."""

    file: str
    number: int
    reason: str


def read_rows(files: Sequence[Path]) -> Iterator[Row | BadRow]:
    """All rows of all files, in order. Raises DataError for a file that is missing, empty or binary."""
    for file in files:
        check_file(file)
        if file.suffix.lower() in PARQUET_SUFFIXES:
            yield from _parquet(file)
        elif file.suffix.lower() in JSON_SUFFIXES:
            yield from _json_lines(file)
        else:
            yield from _text(file)


def check_file(file: Path) -> None:
    """Raise DataError for what is no data: nothing there, nothing in it, or bytes that are no text."""
    if not file.is_file():
        raise DataError(f"there is no file {str(file)!r}; name a text, JSON-lines (.jsonl) or parquet file.")
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty; there is nothing to train on.")
    if file.suffix.lower() == ".json":
        raise UsageError(
            f"{file} ends in .json; write one object per line and name it .jsonl, so that it is read as a stream."
        )
    if file.suffix.lower() not in PARQUET_SUFFIXES:
        with file.open("rb") as opened:
            head = opened.read(PIECE_BYTES)
        if b"\0" in head or not _is_mostly_text(head):
            raise DataError(f"{file} is binary, not text; name a text, JSON-lines (.jsonl) or parquet file.")


def _is_mostly_text(head: bytes) -> bool:
    """Whether at most a tenth of its bytes are no UTF-8."""
    decoded = codecs.getincrementaldecoder("utf-8")("replace").decode(head)
    return decoded.count("\ufffd") * 10 <= len(decoded)


def _text(file: Path) -> Iterator[Row | BadRow]:
    """A file is one document, in pieces that end with a line; a line that is no UTF-8 is left out and named."""
    held: list[str] = []
    held_bytes, first = 0, 1
    for number, line in _lines(file):
        problem = "it is longer than 64 MiB" if line is None else ""
        text = ""
        if line is not None:
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problem = f"it is not UTF-8 at byte {error.start}"
            if "\0" in text:
                problem = "it holds a zero byte"
        if problem:
            yield BadRow(str(file), number, problem)
            continue
        held.append(text)
        held_bytes += len(text)
        if held_bytes >= PIECE_BYTES:
            yield Row(str(file), first, "".join(held), ends=False)
            held, held_bytes, first = [], 0, number + 1
    yield Row(str(file), first, "".join(held), ends=True)


def _json_lines(file: Path) -> Iterator[Row | BadRow]:
    for number, line in _lines(file):
        if line is not None and not line.strip():
            continue
        yield _json_row(str(file), number, line)


def _json_row(file: str, number: int, line: bytes | None) -> Row | BadRow:
    if line is None:
        return BadRow(file, number, "it is longer than 64 MiB")
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(file, number, f"it is not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRow(file, number, f"it is not JSON: {error.msg} at character {error.pos}")
    except (ValueError, RecursionError) as error:
        return BadRow(file, number, f"it is not JSON that can be read: {type(error).__name__}")
    if not isinstance(value, dict):
        return BadRow(file, number, f"it is a JSON {type(value).__name__}, not an object")
    return Row(file, number, value)


def _parquet(file: Path) -> Iterator[Row | BadRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingDependencyError(
            f"{file} is a parquet file, which pyarrow reads; install it with: pip install 'haversack[parquet]'"
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for index in range(batch.num_rows):
                    number += 1
                    yield _parquet_row(str(file), number, batch, index)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:160].rstrip(".")
        raise DataError(f"{file} can't be read as parquet after row {number} ({reason}).") from None


def _parquet_row(file: str, number: int, batch: Any, index: int) -> Row | BadRow:
    try:
        return Row(file, number, {name: batch.column(name)[index].as_py() for name in batch.schema.names})
    except (ValueError, UnicodeDecodeError) as error:
        return BadRow(file, number, f"it can't be decoded: {' '.join(str(error).split())[:120]}")


def _lines(file: Path) -> Iterator[tuple[int, bytes | None]]:
    """(number, line with its end); None for a line that is too long, which is skipped."""
    with file.open("rb") as opened:
        number = 0
        while line := opened.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
                yield number, line
                continue
            while line and not line.endswith(b"\n"):
                line = opened.readline(MAX_LINE_BYTES)
            yield number, None
