"""Checkpoints of a run: a folder of safetensors and JSON each, written whole or not at all, with a checksum of every byte.

`step-00000120/state.safetensors` holds the tensors; `checkpoint.json` the step, plain values, fingerprints, a SHA-256 of every
tensor and one of itself. A folder is written under another name, flushed to disk, then renamed; so a kill leaves an old
checkpoint or a new one. What the disk does to it later is found when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haversack.describe.checkpoint import Checkpoint, CheckpointTensor, dtype_name
from haversack.errors import CheckpointError, ModelNotFoundError
from haversack.formats.output import sync_folder, write_synced
from haversack.formats.safetensors_file import SafetensorsWriter, explained, hash_tensors
from haversack.ledger import StoredTensor

if TYPE_CHECKING:
    import torch

STATE_NAME, FACTS_NAME = "state.safetensors", "checkpoint.json"
CHECKPOINT_VERSION = 1
_NAME = re.compile(r"step-(\d{8})")
_PARTIAL = ".partial"


@dataclass(frozen=True)
class SavedCheckpoint:
    """An opened checkpoint whose every byte was checked."""

    path: Path
    step: int
    values: Mapping[str, Any] = field(repr=False)
    fingerprints: Mapping[str, str]
    tensors: Mapping[str, CheckpointTensor] = field(repr=False)
    num_bytes: int

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        return Checkpoint.open(self.path).read(name)


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
    final = checkpoint_path(folder, step)
    partial = final.with_name(final.name + _PARTIAL)
    with explained(final, sum(t.nbytes for t in tensors.values())):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        declared = [StoredTensor(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
        with SafetensorsWriter(partial / STATE_NAME, declared) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            hashes = writer.finish()
            writer.remove_journal()
        facts = {
            "version": CHECKPOINT_VERSION,
            "step": step,
            "values": dict(values),
            "fingerprints": dict(fingerprints),
            "sha256": hashes,
        }
        with explained(final, 0):
            write_synced(partial / FACTS_NAME, json.dumps({**facts, "self_sha256": _self_hash(facts)}).encode())
            sync_folder(partial)
            if final.exists():  # a run that went back writes a step again
                shutil.rmtree(final)
            partial.rename(final)
            sync_folder(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


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
    return SavedCheckpoint(path, facts["step"], facts["values"], facts["fingerprints"], tensors, num_bytes)


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
