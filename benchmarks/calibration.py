"""Calibrating model A and a 1.1B shape as a user would, by `haversack plan --calibrate` in a fresh process with an empty cache: seconds and peak.

The 1.1B model is made from its config (random weights, model A's tokenizer: the work is that of a trained one) under `build/`. What is
measured of the machine and compiled for it is taken from the user's cache; statistics, weighed options and measured plans are made anew. A run that
was stopped begins again, so that its seconds are those of one piece. `python -m benchmarks.calibration [a] [1.1B]`
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.finished_rows import FOLDER, FinishedRows
from benchmarks.results_file import busy_share, write_results
from benchmarks.streaming import CONFIG, make_model
from benchmarks.weights import source_digest
from haversack import data
from haversack.cache import cache_folder

KEPT_OF_THE_CACHE = ("machine-*.json", "runtime-*.json", "kernels", "decoders")
QUESTIONS = {
    "a": ("--tensor-budget", "9MiB", "--context", "1024"),
    "1.1B": ("--tensor-budget", "500MiB", "--context", "2048"),
}
"""At which a plan has to give something up, so that every option is weighed and whole plans are measured."""


def main(names: Sequence[str]) -> None:
    rows = FinishedRows("calibration")
    figures = [rows.get([name, QUESTIONS[name], source_digest()], lambda name=name: calibrated(name)) for name in names]  # type: ignore[misc]
    columns = ["model", "minutes", "CPU minutes", "peak, GiB", "share of the cores that others used"]
    cells = [
        [row["model"], f"{row['seconds'] / 60:.1f}", f"{row['cpu_seconds'] / 60:.1f}", f"{row['peak_bytes'] / 2**30:.2f}", f"{row['busy']:.0%}"]
        for row in figures
    ]  # fmt: skip
    table = {"title": "Calibration, from nothing to a plan", "columns": columns, "rows": cells}
    print(write_results("calibration", figures, tables=[table]))


def calibrated(name: str) -> dict[str, Any]:
    """One model, from an empty cache: wall and CPU seconds, the peak of its private and shared pages, and what the plan says."""
    folder, cache = model_folder(name), (FOLDER / "calibration-cache" / name).resolve()
    _empty_cache(cache / "haversack")
    command = [sys.executable, "-m", "haversack", "plan", str(folder), *QUESTIONS[name], "--calibrate", "--json"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, env=os.environ | {"XDG_CACHE_HOME": str(cache)}, stdout=subprocess.PIPE, check=True)
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(cache)
    plan = json.loads(done.stdout)
    return {
        "model": name,
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_bytes": 1024 * after.ru_maxrss,
        "busy": busy_share(),
        "fits": plan["fits"],
        "damage": plan["damage"],
    }


def model_folder(name: str) -> Path:
    """A model that ships, or the 1.1B shape with A's tokenizer, whose ids are all below its vocabulary's size."""
    if name != "1.1B":
        return data.reference_model(name)
    folder = make_model(Path("build/llama-1.1b"), CONFIG)
    for file in data.reference_model("a").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def _empty_cache(cache: Path) -> None:
    """A cache with nothing in it but what this machine was found to be."""
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    for pattern in KEPT_OF_THE_CACHE:
        for kept in cache_folder().glob(pattern):
            (shutil.copytree if kept.is_dir() else shutil.copy)(kept, cache / kept.name)


if __name__ == "__main__":
    main(sys.argv[1:] or list(QUESTIONS))
