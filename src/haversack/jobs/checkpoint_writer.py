"""Checkpoints written while training goes on: from the weights as they lie, which do not change until the next update.

A thread writes during the next step's forward and backward passes; the update waits for it. So no copy is made and the peak stays what it was. The
idea of copying while weights can't change is from DataStates-LLM (Maurya et al. 2024, arXiv 2406.10707, section 5); here what it
copies to is the file itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from haversack.engine.training_state import TrainingState
from haversack.errors import HaversackError, OutputError
from haversack.formats.checkpoints import (
    begin_checkpoint,
    drop_unfinished,
    finish_checkpoint,
    note_hashes,
    noted_hashes,
    remove_checkpoints,
    write_part,
)
from haversack.jobs.ranks import ALONE, Ranks

KEPT = 2
"""The newest, and the one before it for the case that the newest is damaged."""


class CheckpointWriter:
    """Writes one checkpoint at a time into `folder` and keeps the newest `KEPT`. `last_saved` is the step of the newest that is
    whole; `failures` counts those since. Of several ranks each writes its rows, the first one finishes; all call alike."""

    def __init__(self, folder: Path, fingerprints: Mapping[str, str], ranks: Ranks = ALONE):
        self.folder = folder
        self.fingerprints = dict(fingerprints)
        self.ranks = ranks
        self.last_saved: int | None = None
        self.failures = 0
        self._thread: threading.Thread | None = None
        self._writing: tuple[int, TrainingState] | None = None
        self._error: Exception | None = None

    def begin(self, step: int, state: TrainingState) -> None:
        """Start writing; until `wait` has returned, nothing in `state` may change."""
        self.wait()
        if self.ranks.is_first:
            self._trying(begin_checkpoint, self.folder, step, sum(t.nbytes for t in state.tensors.values()))
        self.ranks.wait()
        self._writing = step, state
        self._thread = threading.Thread(target=self._trying, args=(self._write, step, state), name="checkpoint")
        self._thread.start()

    def wait(self) -> str | None:
        """Until nothing is being written; why the last checkpoint could not be written, once."""
        if self._thread is not None and self._writing is not None:
            self._thread.join()
            step, state = self._writing
            self._thread = self._writing = None
            self._finish(step, state)
        error, self._error = self._error, None
        if error is not None and not isinstance(error, HaversackError | OSError):
            raise error
        return None if error is None else str(error)

    def _write(self, step: int, state: TrainingState) -> None:
        if self._error is not None:
            return
        if not self.ranks.are_several:
            hashes = write_part(self.folder, step, state.tensors)
            finish_checkpoint(self.folder, step, hashes, state.values, self.fingerprints)
            return
        hashes = write_part(self.folder, step, state.tensors, state.sharded, (self.ranks.rank, self.ranks.size))
        note_hashes(self.folder, step, self.ranks.rank, hashes)

    def _finish(self, step: int, state: TrainingState) -> None:
        """Where all went well, the checkpoint is there on every rank's word."""
        failed = self.ranks.any(self._error is not None)
        if not failed and self.ranks.are_several and self.ranks.is_first:
            self._trying(self._join, step, state)
        failed = self.ranks.any(self._error is not None)
        if failed:
            self.failures += 1
            self._error = self._error or OutputError("another rank could not write its part.")
            if self.ranks.is_first:
                drop_unfinished(self.folder, step)
            return
        self.last_saved, self.failures = step, 0
        if self.ranks.is_first:
            self._trying(remove_checkpoints, self.folder, keep=KEPT)

    def _join(self, step: int, state: TrainingState) -> None:
        hashes = noted_hashes(self.folder, step)
        finish_checkpoint(self.folder, step, hashes, state.values, self.fingerprints, state.sharded)

    def _trying(self, do: Callable[..., object], *args: Any, **named: Any) -> None:
        try:
            do(*args, **named)
        except Exception as error:  # given to whoever waits
            self._error = error
