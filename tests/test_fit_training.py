"""How a run fits: what changes no result first, the fastest of it; what is given up only then, and said."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tests.describe.families import FAMILIES

from haversack.cost.training_seconds import training_seconds
from haversack.describe.machine import detect
from haversack.describe.model import Model, describe_model
from haversack.describe.parallel import Parallelism
from haversack.describe.workload import TrainingWorkload, TuneWorkload
from haversack.errors import DoesNotFitError
from haversack.plan import fit_training as module
from haversack.plan.fit_training import TrainingFit, fit_training
from haversack.plan.training import TrainingQuestion, predict_training

CONFIG: dict[str, Any] = {**FAMILIES["llama"], "num_hidden_layers": 4, "dtype": "float32"}
ASKED = TuneWorkload(4, 32, method="full", precision="master")


@pytest.fixture(scope="module")
def model() -> Model:
    return describe_model(CONFIG)


@pytest.fixture(autouse=True)
def no_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few ways, so that few are traced; the loss has tests of its own."""
    monkeypatch.setattr(module, "cuts", lambda model: False)


def _question(model: Model, workload: Any, budget_bytes: int | None) -> TrainingQuestion:
    return TrainingQuestion(model, workload, detect(), Parallelism(), budget_bytes, "tensor")


def _peak(model: Model, **fields: Any) -> int:
    return predict_training(_question(model, dataclasses.replace(ASKED, **fields), None)).ledger.peak()[1]


def _fit(model: Model, budget_bytes: int | None, pinned: frozenset[str] = frozenset()) -> TrainingFit:
    return fit_training(_question(model, ASKED, budget_bytes), pinned)


def _chosen(workload: TrainingWorkload) -> tuple[int, int, str, str]:
    return workload.batch_size, workload.accumulation_steps, workload.recompute, workload.optimizer


def test_with_room_nothing_is_computed_twice(model: Model) -> None:
    found = _fit(model, None)
    assert _chosen(found.workload) == (4, 1, "none", "adamw") and not found.given_up


def test_the_fastest_lossless_choice_that_fits(model: Model) -> None:
    budget = _peak(model, batch_size=2, accumulation_steps=2)
    found = _fit(model, budget)
    assert found.answer.ledger.peak()[1] <= budget and not found.given_up
    assert (
        _chosen(found.workload) != (4, 1, "none", "adamw")
        and found.workload.accumulation_steps * found.workload.batch_size == 4
    )
    same = training_seconds(model, predict_training(_question(model, dataclasses.replace(ASKED, batch_size=2, accumulation_steps=2), None)).cost, detect())  # fmt: skip
    assert found.seconds_per_step <= same


def test_what_is_given_up_is_said_and_comes_last(model: Model) -> None:
    least = _peak(model, batch_size=1, accumulation_steps=4, recompute="full")
    assert not _fit(model, least).given_up
    found = _fit(model, least - 1)
    assert found.given_up and found.answer.ledger.peak()[1] < least


def test_what_is_pinned_stays(model: Model) -> None:
    pinned = frozenset({"method", "optimizer"})
    with pytest.raises(DoesNotFitError, match="even with method full") as caught:
        _fit(model, _peak(model, batch_size=1, accumulation_steps=4, recompute="full") - 1, pinned)
    assert caught.value.shortfall_bytes == 1 and caught.value.cheapest_change


def test_updates_during_the_backward_pass_are_chosen_where_they_make_it_fit(model: Model) -> None:
    """The same result where nothing is clipped by all gradients together; where it is, not clipping is named as the change."""
    question = _question(
        model, dataclasses.replace(ASKED, batch_size=1, seq_len=4), None
    )  # gradients are the most of it
    pinned = frozenset({"method", "optimizer", "recompute"})
    together = fit_training(question, pinned).answer.ledger.peak()[1]
    tight = dataclasses.replace(question, budget_bytes=together - 1)
    found = fit_training(tight, pinned, clips=False)
    assert found.workload.update == "backward" and not found.given_up
    assert found.answer.ledger.peak()[1] < together
    with pytest.raises(DoesNotFitError) as caught:
        fit_training(tight, pinned)
    assert "--clip 0" in (caught.value.cheapest_change or "")
    assert fit_training(question, pinned, clips=False).workload.update == "step"
