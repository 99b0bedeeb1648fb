"""Finished rows of a benchmark, kept under `build/bench/` so that a stopped run goes on where it was.

A row is found by a key that names everything it depends on: the contender and its settings, the model's bytes, the text, the
scripts. What changed is measured again, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path("build/bench")


class FinishedRows:
    """JSON lines `[key, row]`, appended as rows are finished."""

    def __init__(self, name: str):
        self.path = FOLDER / f"{name}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, Any] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    key, row = json.loads(line)
                except ValueError:
                    continue  # the last line of a killed run
                self.rows[key] = row

    def __contains__(self, depends_on: Any) -> bool:
        return digest(depends_on) in self.rows

    def get(self, depends_on: Any, make: Callable[[], Any]) -> Any:
        """The finished row, or what `make` returns, kept."""
        if depends_on not in self:
            self.put(depends_on, make())
        return self.rows[digest(depends_on)]

    def put(self, depends_on: Any, row: Any) -> None:
        """Keep a row."""
        key = digest(depends_on)
        self.rows[key] = row
        with self.path.open("a") as file:
            file.write(json.dumps([key, row]) + "\n")


def digest(of: Any) -> str:
    """Of anything JSON can write."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:24]
