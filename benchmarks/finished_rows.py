"""Finished rows of a benchmark, kept under `build/bench/` so that a stopped run goes on where it was.

A row is found by a key that names everything it depends on: the contender and its settings, the model's bytes, the text, the
scripts. What changed is measured again, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path("build/bench")


class FinishedRows:
    """JSON lines `[key, row, seconds]`, appended as rows are finished; the seconds are those since the row before."""

    def __init__(self, name: str):
        self.path = FOLDER / f"{name}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, Any] = {}
        self._earlier: dict[str, float | None] = {}
        self._used: set[str] = set()
        self._last = time.monotonic()
        _OPENED.append(self)
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    key, row, *seconds = json.loads(line)
                except ValueError:
                    continue  # the last line of a killed run
                self.rows[key] = row
                self._earlier[key] = seconds[0] if seconds else None

    def __contains__(self, depends_on: Any) -> bool:
        key = digest(depends_on)
        self._used.add(key)
        return key in self.rows

    def get(self, depends_on: Any, make: Callable[[], Any]) -> Any:
        """The finished row, or what `make` returns, kept."""
        if depends_on not in self:
            self.put(depends_on, make())
        return self.rows[digest(depends_on)]

    def put(self, depends_on: Any, row: Any) -> None:
        """Keep a row."""
        key, now = digest(depends_on), time.monotonic()
        seconds, self._last = now - self._last, now
        self.rows[key] = row
        self._earlier.pop(key, None)
        with self.path.open("a") as file:
            file.write(json.dumps([key, row, round(seconds, 1)]) + "\n")

    @property
    def earlier_seconds(self) -> float:
        """What earlier runs took for the rows that this one was asked for, where they said it."""
        return sum(self._earlier.get(key) or 0.0 for key in self._used)

    @property
    def untimed_rows(self) -> int:
        """Rows among them whose time no run kept."""
        return sum(key in self._earlier and self._earlier[key] is None for key in self._used)


_OPENED: list[FinishedRows] = []


def earlier_seconds() -> float:
    """Of all rows that this process took over from earlier runs."""
    return sum(rows.earlier_seconds for rows in _OPENED)


def untimed_rows() -> int:
    """Rows among them whose time no run kept."""
    return sum(rows.untimed_rows for rows in _OPENED)


def digest(of: Any) -> str:
    """Of anything JSON can write."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:24]
