"""Plans judged by probes, on a small random model: heads weighed one by one, whole plans measured, each probe in the plan and its report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.engine.tiny import random_ids, save_tiny

from haversack.cost.calibrated import Calibration, probed_caches
from haversack.cost.damage import NONE, Damage
from haversack.cost.single_changes import stage_model
from haversack.describe.machine import Machine
from haversack.describe.model import describe_model
from haversack.describe.workload import ServeWorkload
from haversack.engine.windows import TextWindows
from haversack.jobs.pack import pack
from haversack.parts.kv.base import KVOption
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.plan.make import make_plan
from haversack.plan.question import Question
from haversack.plan.refine import PlanMeter
from haversack.plan.schema import Plan
from haversack.probes.suite import Task, Turn
from haversack.report.page import render

LENGTH = 112
FOUR = WeightOption(grid=IntegerGrid(4, 64, symmetric=False), rounding=NearestRounding())


class Rows:
    def __init__(self):
        self.rows: dict = {}

    def add(self, key: str, value: object) -> None:
        self.rows[key] = value


def tasks(seed: int) -> tuple[Task, ...]:
    ids = random_ids(4, LENGTH, seed).tolist()
    made = [
        Task(kind, tuple(row[:-8]), (Turn(tuple(row[-8:-4]), tuple(row[-4:])),), announced=tuple(row[-8:-4]))
        for kind, row in zip(("needle", "records"), ids)
    ]
    return (*made, Task("text at 80", tuple(ids[2][:80]), (Turn((ids[2][80],), tuple(ids[2][81:96])),)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The answer, its meter's trials, and the model's folder."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("probed")
    config = save_tiny("llama", folder / "model") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 256}))
    model = describe_model(config.parent)
    rows = Rows()
    staged = stage_model(model)
    caches = probed_caches(
        staged, tasks(1), random_ids(1, LENGTH, 5)[0].tolist(), LENGTH, rows, folder / "scratch", lambda *_: None
    )
    weights = {site.id: {WeightOption(): NONE, FOUR: Damage(0.004, "proxied")} for site in model.weights}
    windows = TextWindows(random_ids(4, 64, 7), random_ids(2, 64, 8), random_ids(2, 64, 9))
    (folder / "statistics").mkdir()
    statistics = type("Nothing", (dict,), {"folder": folder / "statistics"})()
    calibration = Calibration(model, windows, statistics, weights, caches, (), tasks(2), tasks(3))
    question = Question(
        model=model,
        workload=ServeWorkload(LENGTH - 16, 17, prefill_chunk_tokens=32),  # or a smaller chunk would do instead
        machine=Machine("test", 2, 2**33, 2**33),
        budget_bytes=2**33,
        budget_kind="tensor",
        weight_damages=weights,
        kv_damages=caches,
    )
    whole = make_plan(question).plan.prediction.peak_bytes
    held = sum(
        KVOption().stored_bytes(s, batch_size=1, capacity_tokens=LENGTH, dtype=model.dtype) for s in model.attention
    )
    tight = replace(question, budget_bytes=int(whole - 0.3 * held))
    answer = make_plan(tight, meter=PlanMeter(calibration, 3, lambda *_: None))
    state = next((folder / "statistics").glob("plans-*.json"))
    return SimpleNamespace(
        answer=answer, caches=caches, rows=rows, trials=json.loads(state.read_text())["trials"], model=model
    )


def test_every_head_was_measured_alone_on_text_and_every_probe(made):
    measured = [value for key, value in made.rows.rows.items() if key.startswith("KL ")]
    assert len(measured) > 20
    assert all(set(row) == {"text", "needle", "records"} for row in measured)
    for table in made.caches.values():
        assert table[KVOption()] == NONE
        assert any(option.heads for option in table)  # heads that differ
        assert all(
            dict(damage.probes).keys() == {"needle", "records"} for o, damage in table.items() if not o.is_neutral
        )


def test_whole_plans_were_measured_on_each_and_judged_by_the_worst(made):
    assert len(made.trials) == 3
    for trial in made.trials:
        assert len(trial["probes"]) == 3 and trial["measured"] == max(trial["probes"]) > 0


def test_the_plan_and_its_report_show_each_probe(made):
    plan = made.answer.require_fit()
    damage = plan.prediction.damage
    assert set(damage.probes) == {"needle", "records"} and damage.label == "measured"
    assert damage.worst_probe == max(damage.probes, key=damage.probes.get)
    assert Plan.from_json(plan.to_json()) == plan
    assert "nats per answer token; the plan is judged by the worst" in render(plan, None, "plan.json", folder=False)
    assert any(row.stored_bytes < row.neutral_bytes for row in plan.kv)


def test_a_plan_by_heads_packs_and_generates_within_its_bytes(made, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    plan = made.answer.require_fit()
    out = tmp_path / "packed"
    pack(made.model, plan, out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    tokens = random_ids(1, LENGTH - 16, 11)
    result = model.generate(
        tokens, max_new_tokens=17, do_sample=False, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0
    )
    stored = sum(row.stored_bytes for row in plan.kv)
    assert result.past_key_values.num_bytes() <= stored
    assert result.sequences.shape[1] == LENGTH + 1
