"""What the runtimes hold: measured in fresh processes, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from haversack.describe import runtime
from haversack.describe.machine import detect


def test_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr(runtime, "_serving_bytes", lambda: asked.append("serve") or 300 << 20)
    monkeypatch.setattr(runtime, "_training_bytes", lambda: asked.append("train"))
    for _ in range(2):
        rates = runtime.with_runtimes(detect()).rates
        assert (rates.runtime_private_bytes, rates.training_private_bytes) == (300 << 20, None)
    assert asked == ["serve", "train"]
    (kept,) = (tmp_path / "haversack").glob("runtime-*.json")
    for damaged in ("{", "[]", json.dumps({"serve": "many", "train": 1}), json.dumps({"serve": True, "train": 1})):
        kept.write_text(damaged)
        assert runtime.with_runtimes(detect()).rates.runtime_private_bytes == 300 << 20
    assert asked[2:] == ["serve", "train"] * 4


def test_a_cache_that_cannot_be_written_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "haversack").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(runtime, "_serving_bytes", lambda: 1)
    monkeypatch.setattr(runtime, "_training_bytes", lambda: 2)
    assert runtime.with_runtimes(detect()).rates.training_private_bytes == 2
