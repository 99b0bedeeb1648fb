"""GGUF files read as if they were hostile: metadata, and where each tensor lies; versions 2 and 3, little-endian.

A file is a magic word, a version, two counts, the metadata, one entry per tensor (name, shape with the fastest axis first,
type, offset), and the data, every tensor aligned. Source: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from haversack.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
"""Types of metadata values, by number; scalars with struct's letter."""

_MAX_ENTRIES, _MAX_DEPTH, _MAX_DIMENSIONS = 1 << 20, 4, 4


@dataclass(frozen=True)
class Block:
    """A type of tensors: values per block and the block's bytes."""

    name: str
    num_values: int
    num_bytes: int


TYPES = {
    0: Block("F32", 1, 4), 1: Block("F16", 1, 2), 30: Block("BF16", 1, 2),
    2: Block("Q4_0", 32, 18), 3: Block("Q4_1", 32, 20), 6: Block("Q5_0", 32, 22), 7: Block("Q5_1", 32, 24),
    8: Block("Q8_0", 32, 34), 10: Block("Q2_K", 256, 84), 11: Block("Q3_K", 256, 110), 12: Block("Q4_K", 256, 144),
    13: Block("Q5_K", 256, 176), 14: Block("Q6_K", 256, 210),
}  # fmt: skip
"""Types that are read, by number. The IQ types, whose tables are ggml's own, are not."""

NUMBERS = {block.name: number for number, block in TYPES.items()}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its shape with the slowest axis first, its type, and its absolute bytes `[start, stop)`."""

    name: str
    shape: tuple[int, ...]
    block: Block
    start: int
    stop: int


@dataclass(frozen=True)
class GgufFile:
    """A file's header."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Read and check the header. Raises CheckpointError: truncated, lying, overlapping, or of types that aren't read."""
        path = Path(path)
        with path.open("rb") as stream:
            reader = _Reader(stream, path)
            if reader.take(4) != MAGIC:
                raise reader.bad("it does not begin as one")
            version = reader.scalar("I")
            if version not in VERSIONS:
                raise reader.bad(f"it has version {version}, where {' and '.join(map(str, VERSIONS))} are read")
            num_tensors, num_pairs = reader.count("tensors", _MAX_ENTRIES), reader.count("values", _MAX_ENTRIES)
            metadata: dict[str, Any] = {}
            for _ in range(num_pairs):
                key = reader.text()
                metadata[key] = reader.value(reader.scalar("I"))
            entries = [reader.entry() for _ in range(num_tensors)]
            return cls(path, metadata, _placed(entries, metadata, stream.tell(), reader))


class _Reader:
    """Reads values one after another, none longer than what is left of the file."""

    def __init__(self, stream: BinaryIO, path: Path):
        self.stream, self.path = stream, path
        self.file_bytes = path.stat().st_size

    def bad(self, found: str) -> CheckpointError:
        return CheckpointError(f"{str(self.path)!r} is not a sound GGUF file: {found}. Download or convert it again.")

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > self.file_bytes - self.stream.tell():
            raise self.bad(f"{num_bytes} bytes are due at byte {self.stream.tell()}, but it ends at {self.file_bytes}")
        return self.stream.read(num_bytes)

    def scalar(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def count(self, what: str, most: int) -> int:
        number = self.scalar("Q")
        if number > most:
            raise self.bad(f"it claims {number} {what}, where {most} are the most")
        return number

    def text(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, number = self.scalar("I"), self.scalar("Q")
            if depth >= _MAX_DEPTH:
                raise self.bad("its lists are nested too deep")
            if inner in SCALARS:
                data = self.take(number * struct.calcsize(f"<{SCALARS[inner]}"))
                return list(struct.unpack(f"<{number}{SCALARS[inner]}", data))
            if number > self.file_bytes:
                raise self.bad(f"a list claims {number} values")
            return [self.value(inner, depth + 1) for _ in range(number)]
        if kind not in SCALARS:
            raise self.bad(f"a value has the unknown type {kind}")
        return self.scalar(SCALARS[kind])

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_axes = self.text(), self.scalar("I")
        if not 1 <= num_axes <= _MAX_DIMENSIONS:
            raise self.bad(f"tensor {name!r} has {num_axes} axes")
        shape = struct.unpack(f"<{num_axes}Q", self.take(8 * num_axes))
        return name, tuple(reversed(shape)), self.scalar("I"), self.scalar("Q")


def _placed(
    entries: list[tuple[str, tuple[int, ...], int, int]], metadata: Mapping[str, Any], header: int, reader: _Reader
) -> dict[str, GgufTensor]:
    """The tensors with their bytes, which must lie in the file and apart from one another."""
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise reader.bad(f"its alignment is {alignment!r}, where a power of two is due")
    begin = -(-header // alignment) * alignment
    found: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in entries:
        if kind not in TYPES:
            known = ", ".join(block.name for block in TYPES.values())
            raise CheckpointError(
                f"Tensor {name!r} of {str(reader.path)!r} has GGUF type {kind}, which is not read; {known} are: convert the model "
                "to one of them."
            )
        block = TYPES[kind]
        if name in found or not prod(shape) or shape[-1] % block.num_values:
            what = (
                "is there twice"
                if name in found
                else f"of shape {list(shape)} is no whole number of {block.name} blocks"
            )
            raise reader.bad(f"tensor {name!r} {what}")
        start = begin + offset
        found[name] = GgufTensor(name, shape, block, start, start + prod(shape) // block.num_values * block.num_bytes)
    end = begin
    for tensor in sorted(found.values(), key=lambda t: t.start):
        if tensor.start < end or tensor.stop > reader.file_bytes:
            what = (
                "overlaps the one before it"
                if tensor.start < end
                else f"ends beyond the file's {reader.file_bytes} bytes"
            )
            raise reader.bad(f"tensor {tensor.name!r} at bytes {tensor.start} to {tensor.stop} {what}")
        end = tensor.stop
    return found
