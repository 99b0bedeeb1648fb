"""Checkpoints of a run: a folder of safetensors and JSON each, written whole or not at all, with a checksum of every byte.

`step-00000120/state.safetensors` holds the tensors; `checkpoint.json` the step, plain values, fingerprints, a SHA-256 of every
tensor and one of itself. Several ranks write a file each, `state-RANK-of-SIZE.safetensors`, with their rows of a tensor under `NAME#RANK`;
`checkpoint.json` then has the whole shapes, so that any number of ranks can read it. A folder is written under another name, flushed to disk, then renamed; so a kill leaves an old
checkpoint or a new one. What the disk does to it later is found when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haversack.describe.checkpoint import Checkpoint, CheckpointTensor, torch_dtype
from haversack.describe.site import TensorSlice
from haversack.errors import CheckpointError, ModelNotFoundError
from haversack.formats.output import sync_folder, write_synced
from haversack.formats.safetensors_file import explained, hash_tensors, write_tensors

if TYPE_CHECKING:
    import torch

STATE_NAME, FACTS_NAME = "state.safetensors", "checkpoint.json"
CHECKPOINT_VERSION = 1
_NAME = re.compile(r"step-(\d{8})")
_PARTIAL = ".partial"


@dataclass(frozen=True)
class SavedCheckpoint:
    """An opened checkpoint whose every byte was checked. `pieces` are, of tensors that several ranks wrote, the names of their rows in
    order."""

    path: Path
    step: int
    values: Mapping[str, Any] = field(repr=False)
    fingerprints: Mapping[str, str]
    tensors: Mapping[str, CheckpointTensor] = field(repr=False)
    num_bytes: int
    sharded: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    @cached_property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Saved tensors with their whole shapes."""
        alone = {name: tensor.shape for name, tensor in self.tensors.items() if "#" not in name}
        return {**alone, **self.sharded}

    @cached_property
    def _opened(self) -> Checkpoint:
        return Checkpoint.open(self.path)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """One tensor, or its rows from the first to before the second, in memory of its own."""
        import torch

        if rows is None:
            if name not in self.sharded:
                return self._opened.read(name)
            rows = (0, self.sharded[name][0])
        if name not in self.sharded:
            return self._opened.read(TensorSlice(name, (rows,)))
        found: list[torch.Tensor] = []
        begin = 0
        for piece in _pieces(name, self.tensors):
            end = begin + self.tensors[piece].shape[0]
            inside = max(rows[0], begin) - begin, min(rows[1], end) - begin
            if inside[0] < inside[1]:
                found.append(self._opened.read(TensorSlice(piece, (inside,))))
            begin = end
        if not found:
            first = self.tensors[_pieces(name, self.tensors)[0]]
            return torch.empty((0, *first.shape[1:]), dtype=torch_dtype(first.dtype))
        return found[0] if len(found) == 1 else torch.cat(found)


def _pieces(name: str, tensors: Mapping[str, CheckpointTensor]) -> list[str]:
    """Names of a sharded tensor's rows, by rank."""
    found: list[str] = []
    while f"{name}#{len(found)}" in tensors:
        found.append(f"{name}#{len(found)}")
    return found


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def saved_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder, oldest first; nothing is opened."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))


def write_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    values: Mapping[str, Any],
    fingerprints: Mapping[str, str],
) -> Path:
    """Write one, streaming from the tensors as they lie: no copy is made. Raises OutputError (full disk), leaving nothing."""
    begin_checkpoint(folder, step, sum(t.nbytes for t in tensors.values()))
    try:
        hashes = write_part(folder, step, tensors)
        return finish_checkpoint(folder, step, hashes, values, fingerprints)
    except BaseException:
        drop_unfinished(folder, step)
        raise


def begin_checkpoint(folder: Path, step: int, num_bytes: int = 0) -> None:
    """An empty folder to write into, under another name. Raises OutputError."""
    partial = _partial(folder, step)
    with explained(checkpoint_path(folder, step), num_bytes):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)


def write_part(
    folder: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    sharded: Collection[str] = (),
    part: tuple[int, int] | None = None,
) -> dict[str, str]:
    """Write the tensors of a checkpoint that was begun; of `part` (rank, size) those of one rank, which has rows of `sharded`. The
    SHA-256 of each by its name in the file."""
    name = STATE_NAME if part is None else _part_name(*part)
    named = {key if key not in sharded or part is None else f"{key}#{part[0]}": t for key, t in tensors.items()}
    return write_tensors(_partial(folder, step) / name, named)


def note_hashes(folder: Path, step: int, rank: int, hashes: Mapping[str, str]) -> None:
    """Leave a rank's hashes for the one that finishes the checkpoint. Raises OutputError."""
    file = _partial(folder, step) / f"hashes-{rank}.json"
    with explained(file, 0):
        write_synced(file, json.dumps(dict(hashes)).encode())


def noted_hashes(folder: Path, step: int) -> dict[str, str]:
    """All ranks' hashes, whose notes are removed."""
    found: dict[str, str] = {}
    for file in sorted(_partial(folder, step).glob("hashes-*.json")):
        found |= json.loads(file.read_bytes())
        file.unlink()
    return found


def finish_checkpoint(
    folder: Path,
    step: int,
    hashes: Mapping[str, str],
    values: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    sharded: Mapping[str, tuple[int, ...]] | None = None,
) -> Path:
    """Give a checkpoint whose parts are written its facts and its name. Raises OutputError."""
    final, partial = checkpoint_path(folder, step), _partial(folder, step)
    facts = {
        "version": CHECKPOINT_VERSION,
        "step": step,
        "values": dict(values),
        "fingerprints": dict(fingerprints),
        "sha256": dict(hashes),
        "sharded": {name: list(shape) for name, shape in (sharded or {}).items()},
    }
    with explained(final, 0):
        write_synced(partial / FACTS_NAME, json.dumps({**facts, "self_sha256": _self_hash(facts)}).encode())
        sync_folder(partial)
        if final.exists():  # a run that went back writes a step again
            shutil.rmtree(final)
        partial.rename(final)
        sync_folder(folder)
    return final


def drop_unfinished(folder: Path, step: int) -> None:
    """Remove what was written of a checkpoint that is not finished."""
    shutil.rmtree(_partial(folder, step), ignore_errors=True)


def _partial(folder: Path, step: int) -> Path:
    final = checkpoint_path(folder, step)
    return final.with_name(final.name + _PARTIAL)


def _part_name(rank: int, size: int) -> str:
    return f"state-{rank:05d}-of-{size:05d}.safetensors"


def open_checkpoint(path: Path) -> SavedCheckpoint:
    """Open one and check every byte against its checksum. Raises CheckpointError saying what is damaged."""
    try:
        facts = json.loads((path / FACTS_NAME).read_bytes())
        claimed = facts.pop("self_sha256")
        intact = claimed == _self_hash(facts) and facts["version"] == CHECKPOINT_VERSION
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path / FACTS_NAME} is missing or damaged.")
    try:
        tensors = Checkpoint.open(path).tensors
    except ModelNotFoundError:
        raise CheckpointError(f"{path / STATE_NAME} is missing.") from None
    if set(tensors) != set(facts["sha256"]):
        raise CheckpointError(f"{path / STATE_NAME} holds other tensors than were written.")
    for name, sha256 in hash_tensors(tensors.values()):
        if facts["sha256"][name] != sha256:
            raise CheckpointError(f"{path / STATE_NAME} is damaged in tensor {name!r}.")
    num_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    sharded = {name: tuple(shape) for name, shape in facts.get("sharded", {}).items()}
    return SavedCheckpoint(path, facts["step"], facts["values"], facts["fingerprints"], tensors, num_bytes, sharded)


def newest_intact(folder: Path) -> tuple[SavedCheckpoint | None, list[str]]:
    """The newest checkpoint whose bytes are what was written, and a sentence for each newer one that is damaged."""
    damaged: list[str] = []
    for step in reversed(saved_steps(folder)):
        try:
            return open_checkpoint(checkpoint_path(folder, step)), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, damaged


def remove_checkpoints(folder: Path, *, keep: int) -> None:
    """Remove all but the newest `keep`, and what a kill left unfinished."""
    steps = saved_steps(folder)
    for step in steps[: max(0, len(steps) - keep)]:
        old = checkpoint_path(folder, step)
        gone = old.with_name(old.name + _PARTIAL)
        shutil.rmtree(gone, ignore_errors=True)
        old.rename(gone)  # half of a checkpoint must not look like one
        shutil.rmtree(gone, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what kills left half written or half removed."""
    if folder.is_dir():
        for path in folder.glob(f"*{_PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)


def _self_hash(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
