"""Tuning and training planned: states by formula, ZeRO's example, ranks, refusals, the largest batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.describe.families import FAMILIES

from haversack.cli.app import run
from haversack.cost.parallel import rank_cost, sharded_bytes
from haversack.cost.training import training_cost
from haversack.describe.machine import detect
from haversack.describe.model import describe_model
from haversack.describe.parallel import Parallelism, rank_config, stage_layers
from haversack.describe.workload import TrainWorkload, TuneWorkload, workload_from_dict
from haversack.engine.training_trace import ACTIVATIONS, GRADIENTS
from haversack.errors import DoesNotFitError, PlanError, UsageError
from haversack.jobs.training_run import measure_tensors
from haversack.plan.training import TrainingQuestion, largest, plan_training

CONFIG: dict[str, Any] = {
    **FAMILIES["llama"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "galore8bit", "apollo-mini"])
@pytest.mark.parametrize("precision", ["bf16", "master"])
def test_states_are_what_the_optimizer_keeps(optimizer: str, precision: str) -> None:
    workload = TrainWorkload(1, 8, optimizer=optimizer, precision=precision)
    cost = training_cost(describe_model(CONFIG), workload)
    kept = measure_tensors(CONFIG, workload)["residents"]
    assert cost.state_bytes == kept["optimizer states"]
    assert cost.staying.get("master weights", 0) == kept.get("master weights", 0)


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.40625), (2, 16.640625), (3, 1.875)])
def test_the_example_of_zero(stage: int, gigabytes: float) -> None:
    """Rajbhandari et al. 2019 (arXiv 1910.02054), figure 1: 7.5 billion weights, 64 ranks."""
    n, layout = 7_500_000_000, Parallelism(data=64, zero=stage)
    owners = {"weights": 2 * n, GRADIENTS: 2 * n, "master weights": 4 * n, "optimizer states": 8 * n}
    assert sum(sharded_bytes(size, owner, layout) for owner, size in owners.items()) == gigabytes * 10**9


def test_ranks_hold_their_share() -> None:
    model, workload = describe_model(CONFIG), TrainWorkload(2, 32, precision="master")
    alone = rank_cost(model, workload, Parallelism()).stages[0]
    sharded = rank_cost(model, workload, Parallelism(data=4, zero=3)).stages[0]
    for owner in ("weights", "optimizer states"):
        assert sharded.timeline["update"][owner]["device"] == pytest.approx(
            alone.timeline["update"][owner]["device"] / 4, abs=4
        )
    host = rank_cost(model, workload, Parallelism(data=4, zero=3, offload=True)).stages[0]
    assert "optimizer states" not in host.owners_at("update") and host.owners_at("update", "host")["optimizer states"]
    split = rank_cost(model, workload, Parallelism(tensor=2)).stages[0]
    assert split.timeline["backward"][ACTIVATIONS]["device"] < alone.timeline["backward"][ACTIVATIONS]["device"]
    staged = rank_cost(model, workload, Parallelism(pipeline=3))
    assert staged.layers == (2, 1, 1)
    assert sum(s.timeline["update"]["weights"]["device"] for s in staged.stages) == pytest.approx(
        alone.timeline["update"]["weights"]["device"], rel=0.01
    )


def test_whole_degrees_only() -> None:
    assert [len(layers) for layers in stage_layers(10, 4)] == [3, 3, 2, 2]
    with pytest.raises(UsageError, match="at most 4"):
        stage_layers(4, 5)
    with pytest.raises(UsageError, match="3 tensor-parallel ranks don't divide num_attention_heads 4"):
        rank_config(CONFIG, Parallelism(tensor=3), "a model")
    with pytest.raises(UsageError, match="has no experts"):
        rank_config(CONFIG, Parallelism(data=2, expert=2), "a model")
    for fields in ({"data": 0}, {"zero": 4}, {"data": 3, "expert": 2}, {"offload": True}):
        with pytest.raises(UsageError):
            Parallelism(**fields)
    with pytest.raises(UsageError, match="3 context-parallel ranks don't divide sequences of 32"):
        rank_cost(describe_model(CONFIG), TrainWorkload(1, 32), Parallelism(context=3))


def _question(budget_bytes: int | None, **fields: Any) -> TrainingQuestion:
    workload = TrainWorkload(4, 32, **fields)
    return TrainingQuestion(describe_model(CONFIG), workload, detect(), Parallelism(), budget_bytes, "tensor")


def test_refused_early_with_the_cheapest_change() -> None:
    peak = plan_training(_question(None)).ledger.peak()[1]
    answer = plan_training(_question(peak - 1000))
    assert answer.shortfall_bytes == 1000 and "loss=cut" in (answer.cheapest_change or "")
    much = plan_training(_question(int(0.7 * peak)))
    assert "loss=cut and recompute=" in (much.cheapest_change or "")
    with pytest.raises(DoesNotFitError, match=r"short\.") as caught:
        answer.require_fit()
    assert sum(caught.value.owners.values()) == peak
    assert "would" in (plan_training(_question(1000)).cheapest_change or "")


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    def peak(batch: int) -> int:
        return rank_cost(_question(None).model, TrainWorkload(batch, 32), Parallelism()).stages[0].peak()[1]

    budget = peak(6) - 1
    assert peak(5) <= budget  # else loading, not the step, is the peak
    assert largest(_question(budget), "batch") == 5
    assert largest(_question(1000), "batch") is None


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"recompute": "some"}, "recompute is 'some', but must be one of none, full, or layers as in 0-3,7"),
        ({"attention": "flash"}, "attention is 'flash'"),
        ({"method": "dora"}, "method is 'dora'"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"update": "later"}, "update is 'later'"),
        ({"update": "backward", "accumulation_steps": 2}, "gradients that are dropped as they come can't be summed"),
    ],
)
def test_bad_settings_are_refused_with_what_is_allowed(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        TuneWorkload(1, 8, **fields)


def test_unknown_optimizers_are_refused_with_all_there_are() -> None:
    with pytest.raises(UsageError, match=r"optimizer is 'adamx', but must be one of adafactor, adamw, .*sgdm"):
        plan_training(_question(None, optimizer="adamx"))


def test_workloads_round_trip() -> None:
    for workload in (TrainWorkload(2, 16, optimizer="muon"), TuneWorkload(1, 8, method="qlora")):
        assert workload_from_dict(json.loads(json.dumps(workload.to_dict()))) == workload
    with pytest.raises(PlanError, match="none of serve, tune, train"):
        workload_from_dict({"task": "sing"})


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG))
    base = ["plan", str(file), "--task", "train", "--context", "16"]
    assert run([*base, "--tensor-budget", "1GiB", "--with", "optimizer=sgdm", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] and answer["workload"]["optimizer"] == "sgdm" and answer["timeline"]["backward"]
    assert run([*base, "--tensor-budget", "1KiB"]) == 1
    assert "short" in capsys.readouterr().out
    for wrong, words in (
        (["--with", "optimiser=sgd"], "write KEY=VALUE with one of"),
        (["--with", "zero=5"], "zero is 5, but must be one of 0, 1, 2, 3"),
        (["--with", "tensor=3"], "don't divide"),
        (["--context", "65"], "at most 64"),
        (["--task", "sing"], "one of serve, tune, train"),
        (["--largest", "batch"], "without a budget"),
        (["--users", "4"], "--users was given, but it is for --task serve"),
        (["--probes"], "--probes was given, but it is for --task serve"),
        (["--context", "0"], "--context is 0"),
        (["--budget", "1GiB", "--tensor-budget", "1GiB"], "a plan has one budget"),
        (["--budget", "8 potatoes"], "8 potatoes"),
    ):
        assert run([*base, *wrong]) == 2
        assert words in " ".join(capsys.readouterr().err.split())


def test_a_sharded_rank_peaks_where_it_holds_most() -> None:
    """With gradients sharded, the last layer's backward pass is higher than its end, where all gradients would be."""
    model, workload = describe_model({**CONFIG, "num_hidden_layers": 8}), TrainWorkload(4, 64)
    rank = rank_cost(model, workload, Parallelism(data=64, zero=3)).stages[0]
    backward, loss = rank.owners_at("backward"), rank.owners_at("loss")
    assert backward[ACTIVATIONS] > 0.8 * loss[ACTIVATIONS]
    assert "communication buffers" not in rank.owners_at("update")
    tuned = TuneWorkload(4, 64, method="lora")
    frozen = rank_cost(model, tuned, Parallelism(data=64, zero=3)).stages[0].owners_at("backward")
    assert frozen["communication buffers"] < backward["communication buffers"]


def test_changes_that_cannot_lower_what_is_over_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading alone is over the budget: neither recomputation nor fewer states would do."""
    from haversack.cost import training

    question = _question(1000)
    traced = []
    trace = training.trace_training
    monkeypatch.setattr(training, "trace_training", lambda *given: traced.append(given[1]) or trace(*given))
    answer = plan_training(question)
    assert len(traced) == 1
    assert "a budget of" in (answer.cheapest_change or "")
    plan_training(question)
    assert len(traced) == 1  # kept with the model


@pytest.mark.parametrize(
    ("task", "settings", "complaint"),
    [
        ("train", ["precision=int8"], "precision int8 is for one process"),
        ("train", ["saved=resting"], "saved=resting is for one process"),
        ("train", ["saved=reversible"], "saved=reversible is for one process"),
        ("train", ["update=backward"], "update=backward is for one process"),
        ("tune", ["method=paca"], "methods paca, peqa and side are for one process"),
    ],
)
def test_what_one_process_alone_can_do_is_not_planned_for_ranks(
    task: str, settings: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["llama"]))
    asked = ["plan", str(tmp_path), "--task", task, "--budget", "1GiB", "--context", "32"]
    for setting in (*settings, "data=2"):
        asked += ["--with", setting]
    assert run(asked) == 2
    assert complaint in capsys.readouterr().err
