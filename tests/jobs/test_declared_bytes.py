"""Packed folders run under torch's profiler: residents are what was declared, and nothing allocates beyond its declaration."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
from tests.cli.conftest import save_tokenizer
from tests.engine.tiny import save_tiny

from haversack.cli.app import run
from haversack.jobs.measured_run import measure_tensors


@pytest.mark.parametrize(
    ("family", "dtype", "users"),
    [
        ("gpt2", "float16", 1),  # a step is traced beside the mapped file's header
        ("llama", "float16", 3),  # rotary tables are made in float32
        ("gpt_oss", "float16", 1),  # norms are loaded in float32
        ("gpt_oss", "float32", 1),  # experts clamp what their gates take
    ],
)
def test_what_runs_stays_within_what_was_declared(family: str, dtype: str, users: int, tmp_path: Path) -> None:
    model, packed = save_tiny(family, tmp_path / "model", dtype), tmp_path / "packed"
    save_tokenizer(model)
    asked = ["--context", "24", "--users", str(users), "--tensor-budget", "1GiB", "--evaluations", "0"]
    assert run(["pack", str(model), "-o", str(packed), *asked]) == 0
    timeline = json.loads((packed / "plan.json").read_text())["prediction"]["timeline"]
    measure_tensors(packed)  # what is found once of a family and a machine is found
    gc.collect()  # or the first run's tensors would be let go during the second
    measured = measure_tensors(packed)
    declared = {point: sum(tiers.get("device", 0) for tiers in owners.values()) for point, owners in timeline.items()}
    assert measured["residents"] == {owner: timeline["decode"][owner]["device"] for owner in ("weights", "rest", "kv")}
    for point, found in measured["tensor_peaks"].items():
        assert 0.5 * declared[point] < found <= declared[point], point
