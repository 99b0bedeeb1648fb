"""What a run tells while it goes: a line of JSON per step, evaluation and event, kept in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from haversack.formats.output import write_whole


class TrainingLog:
    """Appends rows to a JSON-lines file; a full disk costs lines, not the run. `watch` is called with all rows after each."""

    def __init__(self, file: Path, watch: Callable[[list[dict[str, Any]]], None] = lambda rows: None):
        self.file = file
        self.rows: list[dict[str, Any]] = list(read_log(file))
        self.watch = watch
        self.lost_lines = 0

    def go_back_to(self, step: int) -> None:
        """Forget figures of steps behind `step`, which will run again; events stay. The file is written whole."""
        self.rows = [row for row in self.rows if row["step"] <= step or "event" in row]
        write_whole(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))

    def step(self, step: int, **figures: float) -> None:
        """Figures of a finished step (the first is 1)."""
        self._add({"step": step, **figures})

    def event(self, step: int, what: str) -> None:
        """Something that a user should know, in one sentence."""
        self._add({"step": step, "event": what})

    @property
    def events(self) -> list[str]:
        return [row["event"] for row in self.rows if "event" in row]

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        try:
            with self.file.open("a") as opened:
                opened.write(json.dumps(row) + "\n")
        except OSError:
            self.lost_lines += 1
        self.watch(self.rows)


def read_log(file: Path) -> Iterator[dict[str, Any]]:
    """Whole rows of a log; a kill may have cut the last one."""
    if not file.is_file():
        return
    for line in file.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            yield row
