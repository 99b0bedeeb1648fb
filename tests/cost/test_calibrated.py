"""One calibration of a model at a time: another process would share its files."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from haversack.cost.calibrated import _one_at_a_time
from haversack.describe.model import Model


def test_a_second_calibration_of_a_model_waits_for_the_first(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, other = (cast(Model, SimpleNamespace(fingerprint=letter * 64)) for letter in "ab")
    told: list[str] = []
    waits, done = threading.Event(), threading.Event()

    def tell(what: str, *_: int) -> None:
        told.append(what)
        waits.set()

    def second() -> None:
        with _one_at_a_time(model, tell):
            done.set()

    thread = threading.Thread(target=second)
    with _one_at_a_time(model, tell), _one_at_a_time(other, tell):
        assert not told, "nobody waits for another model"
        thread.start()
        assert waits.wait(20) and not done.is_set()
    thread.join(20)
    assert done.is_set() and told == ["waiting for another calibration of this model"]
