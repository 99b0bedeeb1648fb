"""Where a benchmark's figures go, and what must stand beside them: machine, versions, commit, date."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from haversack.describe.machine import cpu_model, usable_cores

RESULTS = Path(__file__).parent / "results"


def write_results(name: str, figures: Any, notes: tuple[str, ...] = ()) -> Path:
    """Write `results/NAME.json`, whole or not at all."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    record = {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "machine": {"cpu": cpu_model(), "cores": usable_cores(), "system": platform.platform()},
        "versions": {package: metadata.version(package) for package in ("torch", "transformers", "scipy")},
        "notes": list(notes),
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.rename(path)
    return path
