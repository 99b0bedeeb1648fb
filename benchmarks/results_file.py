"""Where a benchmark's figures go, and what must stand beside them: machine, versions, commit, date."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.finished_rows import earlier_seconds, untimed_rows
from haversack.describe.machine import cpu_model, usable_cores

RESULTS = Path(__file__).parent / "results"


def write_results(
    name: str, figures: Any, notes: tuple[str, ...] = (), *, tables: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """Write `results/NAME.json`, whole or not at all.

    `tables` (each `title`, `columns` and `rows` of strings) are what the documentation shows; where there are any, `figures`
    hold what they were made from. `seconds` is how long the benchmark took, rows that earlier runs finished among it, but for
    `untimed_rows` of them, whose time was not kept; `busy` the share of all cores that other processes used since it began.
    """
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    record = {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "machine": {"cpu": cpu_model(), "cores": usable_cores(), "system": platform.platform()},
        "versions": {package: metadata.version(package) for package in ("torch", "transformers", "scipy")},
        "seconds": round(time.monotonic() - _STARTED + earlier_seconds()),
        "untimed_rows": untimed_rows(),
        "busy": round(busy_share(), 2),
        "notes": list(notes),
        "tables": list(tables),
        "figures": figures,
    }
    if not tables:
        del record["tables"]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.rename(path)
    return path


def busy_share() -> float:
    """Processor time of everybody else, children of this process apart, over all cores' time since this module was read."""
    total, own = _processor_seconds()
    elapsed = max(1e-9, time.monotonic() - _STARTED)
    others = (total - _AT_START[0]) - (own - _AT_START[1])
    return max(0.0, others) / (elapsed * usable_cores())


def _processor_seconds() -> tuple[float, float]:
    """Seconds in which any core computed, since boot; and those of this process and its finished children."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    idle = fields[3] + fields[4]
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK"), own


_STARTED, _AT_START = time.monotonic(), _processor_seconds()
