"""Tokens of a data set in one safetensors file, mapped while training: its pages are the page cache's, not the process's.

Tensors: `tokens` (tokens,) I32; `trained` (tokens,) U8; `ends` (samples,) I64, where each sample ends; `rows` (samples,)
I64, its row in the data; `files` (samples,) I32. Text is one stream: its documents follow one another. A row with a chosen and a
rejected answer gives two samples, in this order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from haversack.describe.checkpoint import Checkpoint
from haversack.formats.output import write_whole
from haversack.formats.safetensors_file import PIECE_BYTES, SafetensorsWriter, explained
from haversack.ledger import StoredTensor
from haversack.samples.read import BadRow, DataError, read_rows
from haversack.samples.tokens import PAIRS, TEXT, Sample, Tokenizing

TOKENS_NAME, FACTS_NAME, BAD_ROWS_NAME = "tokens.safetensors", "data.json", "bad-rows.jsonl"
_DTYPES = {"tokens": "I32", "trained": "U8", "ends": "I64", "rows": "I64", "files": "I32"}
_NUMPY = {"I32": np.int32, "U8": np.uint8, "I64": np.int64}


@dataclass(frozen=True)
class TokenStore:
    """An opened store: arrays mapped from the file, and what was counted when it was made."""

    folder: Path
    form: str
    num_samples: int
    num_bad_rows: int
    longest_tokens: int
    sha256: str
    source_sha256: str
    files: tuple[str, ...]

    @property
    def is_stream(self) -> bool:
        """Whether documents follow one another and are cut anywhere."""
        return self.form == TEXT

    @property
    def is_pairs(self) -> bool:
        """Whether samples come in twos: a chosen answer, then a rejected one to the same prompt."""
        return self.form == PAIRS

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Name -> array, pages of the file."""
        found = {}
        for name, tensor in Checkpoint.open(self.folder).tensors.items():
            found[name] = (
                np.memmap(tensor.file, _NUMPY[tensor.dtype], "r", offset=tensor.start, shape=tensor.shape)
                if tensor.num_bytes
                else np.zeros(tensor.shape, _NUMPY[tensor.dtype])
            )
        return found

    @property
    def num_tokens(self) -> int:
        return len(self.arrays["tokens"])

    def bounds(self, sample: int) -> tuple[int, int]:
        """Where a sample lies among the tokens."""
        ends = self.arrays["ends"]
        return (int(ends[sample - 1]) if sample else 0), int(ends[sample])

    def origin(self, token: int) -> str:
        """`file:row` of the sample that holds a token."""
        sample = int(np.searchsorted(self.arrays["ends"], token, side="right"))
        return f"{Path(self.files[self.arrays['files'][sample]]).name}:{self.arrays['rows'][sample]}"


def hash_files(files: Sequence[Path]) -> str:
    """SHA-256 over the files' bytes, in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while piece := opened.read(PIECE_BYTES):
                digest.update(piece)
        digest.update(b"\0end of file\0")
    return digest.hexdigest()


def open_store(folder: Path) -> TokenStore | None:
    """The store in a folder; None where none was finished."""
    try:
        facts = json.loads((folder / FACTS_NAME).read_text())
        return TokenStore(folder, **{**facts, "files": tuple(facts["files"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def make_store(
    folder: Path,
    files: Sequence[Path],
    tokenizing: Tokenizing,
    *,
    max_tokens: int | None,
    bad_rows_file: Path,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> TokenStore:
    """Read, tokenize and write `files` as a stream, holding one piece at a time. Samples (not text) of more than `max_tokens`
    are bad rows. Bad rows are written to `bad_rows_file`, one JSON object each. Raises DataError where no good row is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(file.stat().st_size for file in files if file.is_file())
    bad_file = bad_rows_file.with_name(bad_rows_file.name + ".partial")
    parts = {name: folder / f"{name}.partial" for name in _DTYPES}
    with _opened(parts) as opened, bad_file.open("w") as bad:
        counted = _tokenize(
            files, tokenizing, max_tokens, opened, bad, lambda done: progress("reading data", done, total)
        )
    if not counted.num_samples:
        first = f" The first: {counted.first_bad.reason}." if counted.first_bad else ""
        bad_file.replace(bad_rows_file)
        raise DataError(
            f"none of the {counted.num_bad} rows of {files[0]} can be trained on.{first} All are named in {bad_rows_file}."
        )
    tensors = [
        StoredTensor(name, dtype, (parts[name].stat().st_size // np.dtype(_NUMPY[dtype]).itemsize,))
        for name, dtype in _DTYPES.items()
    ]
    (folder / TOKENS_NAME).unlink(missing_ok=True)
    with SafetensorsWriter(folder / TOKENS_NAME, tensors) as writer:
        for name, part in parts.items():
            writer.write_pieces(name, _pieces(part))
        hashes = writer.finish()
        writer.remove_journal()
    for part in parts.values():
        part.unlink()
    bad_file.replace(bad_rows_file)
    facts: dict[str, Any] = {
        "form": tokenizing.form,
        "num_samples": counted.num_samples,
        "num_bad_rows": counted.num_bad,
        "longest_tokens": counted.longest,
        "sha256": hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest(),
        "source_sha256": hash_files(files),
        "files": [str(file) for file in files],
    }
    write_whole(folder / FACTS_NAME, json.dumps(facts, indent=1))
    store = open_store(folder)
    assert store is not None
    return store


@dataclass
class _Counted:
    num_samples: int = 0
    num_bad: int = 0
    longest: int = 0
    first_bad: BadRow | None = None


def _tokenize(
    files: Sequence[Path],
    tokenizing: Tokenizing,
    max_tokens: int | None,
    opened: dict[str, BinaryIO],
    bad: Any,
    progress: Callable[[int], None],
) -> _Counted:
    counted = _Counted()
    position = seen = 0
    index = {str(file): number for number, file in enumerate(files)}
    for row in read_rows(files):
        samples: tuple[Sample, ...] | BadRow = row if isinstance(row, BadRow) else tokenizing.samples(row)
        if not isinstance(samples, BadRow):
            samples = _checked(samples, row.file, row.number, tokenizing.form == TEXT, max_tokens)
        if isinstance(samples, BadRow):
            counted.num_bad += 1
            counted.first_bad = counted.first_bad or samples
            bad.write(json.dumps({"file": samples.file, "row": samples.number, "reason": samples.reason}) + "\n")
            continue
        num_tokens = sum(len(sample.ids) for sample in samples)
        if not num_tokens:
            continue  # the rest of a text that ended with the piece before
        counted.num_samples += 1
        counted.longest = max(counted.longest, num_tokens)
        seen += 4 * num_tokens
        for sample in samples:
            position += len(sample.ids)
            values = {"tokens": sample.ids, "trained": sample.trained, "ends": [position], "rows": [row.number],
                      "files": [index[row.file]]}  # fmt: skip
            with explained(Path(opened["tokens"].name), position * 5):
                for name, numbers in values.items():
                    opened[name].write(np.asarray(numbers, _NUMPY[_DTYPES[name]]).tobytes())
        if counted.num_samples % 64 == 0:
            progress(seen)
    return counted


def _checked(
    samples: tuple[Sample, ...], file: str, number: int, is_text: bool, max_tokens: int | None
) -> tuple[Sample, ...] | BadRow:
    if is_text:
        return samples
    if not all(any(sample.trained[1:]) for sample in samples):
        return BadRow(file, number, "it has no token to train on")
    num_tokens = sum(len(sample.ids) for sample in samples)
    if max_tokens is not None and num_tokens > max_tokens:
        both = " in both answers with their prompts" if len(samples) > 1 else ""
        return BadRow(file, number, f"it has {num_tokens} tokens{both}, but a row holds {max_tokens}")
    return samples


class _opened:
    """Files opened for writing, by name, closed together."""

    def __init__(self, paths: dict[str, Path]):
        self.files: dict[str, BinaryIO] = {name: path.open("wb") for name, path in paths.items()}

    def __enter__(self) -> dict[str, BinaryIO]:
        return self.files

    def __exit__(self, *exception: object) -> None:
        for file in self.files.values():
            file.close()


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as opened:
        while piece := opened.read(PIECE_BYTES):
            yield piece
