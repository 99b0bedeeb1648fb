"""Checkpoints written while training goes on: from the weights as they lie, which do not change until the next update.

A thread writes during the next step's forward and backward passes; the update waits for it. So no copy is made and the peak stays what it was. The
idea of copying while weights can't change is from DataStates-LLM (Maurya et al. 2024, arXiv 2406.10707, section 5); here what it
copies to is the file itself.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from haversack.engine.training_state import TrainingState
from haversack.errors import HaversackError
from haversack.formats.checkpoints import remove_checkpoints, write_checkpoint

KEPT = 2
"""The newest, and the one before it for the case that the newest is damaged."""


class CheckpointWriter:
    """Writes one checkpoint at a time into `folder` and keeps the newest `KEPT`. `last_saved` is the step of the newest that is
    whole; `failures` counts those since."""

    def __init__(self, folder: Path, fingerprints: Mapping[str, str]):
        self.folder = folder
        self.fingerprints = dict(fingerprints)
        self.last_saved: int | None = None
        self.failures = 0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def begin(self, step: int, state: TrainingState) -> None:
        """Start writing; until `wait` has returned, nothing in `state` may change."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(step, state), name="checkpoint")
        self._thread.start()

    def wait(self) -> str | None:
        """Until nothing is being written; why the last checkpoint could not be written, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None and not isinstance(error, HaversackError | OSError):
            raise error
        return None if error is None else str(error)

    def _write(self, step: int, state: TrainingState) -> None:
        try:
            write_checkpoint(self.folder, step, state.tensors, state.values, self.fingerprints)
            self.last_saved, self.failures = step, 0
            remove_checkpoints(self.folder, keep=KEPT)
        except Exception as error:  # given to whoever waits
            self._error = error
            self.failures += 1
