"""Tuning and training: a stopped run gives the bits of an unbroken one, damage is found, what can't go on says why."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from haversack.data import reference_model, text
from haversack.describe.machine import detect
from haversack.describe.model import describe_model
from haversack.describe.training_settings import TrainingSettings
from haversack.describe.workload import TuneWorkload
from haversack.errors import DoesNotFitError, InterruptedJobError, OutputError, UsageError
from haversack.formats import checkpoints, safetensors_file
from haversack.jobs import train_loop
from haversack.jobs.train_loop import LossError
from haversack.jobs.tune import TrainingRequest, Watchers, run_training

STEPS = 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 0.2M parameters, with dropout, that reads model A's tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         vocab_size=4096, max_position_embeddings=64, attention_dropout=0.1, bos_token_id=0, eos_token_id=0)  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference_model("a") / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text(text("foreign-prose")[:8000])
    return file


@pytest.fixture
def request_of(
    tiny: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., TrainingRequest]:
    """Runs within 1 GiB, of which this process, with all that other tests left in it, is taken to hold 300 MiB."""
    monkeypatch.setattr("haversack.jobs.training_run.runtime_private_bytes", lambda workload: 300 << 20)

    def make(output: str = "run", files: tuple[Path, ...] = (), **fields: Any) -> TrainingRequest:
        settings = TrainingSettings(rows_per_step=4, steps=STEPS, save_every=2, learning_rate=1e-3, holdout=0.1)
        workload = {"precision": "master", "method": "full", "accumulation_steps": 2, **fields.pop("workload", {})}
        return TrainingRequest(
            model=describe_model(tiny),
            tokenizer_source=tiny,
            files=files or (prose,),
            output=tmp_path / output,
            machine=detect(),
            workload=TuneWorkload(2, 32, **workload),
            pinned=frozenset(workload) | {"recompute"},
            settings=dataclasses.replace(settings, **fields.pop("settings", {})),
            budget_bytes=fields.pop("budget_bytes", 2**30),
            seq_len=32,
            **fields,
        )

    return make


def _stop_after(step: int) -> Watchers:
    def stepped(done: int, total: int, loss: float) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return Watchers(stepped=stepped)


def _losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def _same_bits(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "workload",
    [
        {},
        {"optimizer": "muon", "precision": "fp32"},
        {"optimizer": "adamw8bit", "precision": "bf16", "recompute": "full"},
        {"optimizer": "galore8bit"},
        {"method": "lora", "lora_rank": 2},
        {"method": "qlora", "lora_rank": 2, "precision": "autocast"},
        {"method": "paca", "lora_rank": 4},
        {"method": "side"},
        {"precision": "int8", "optimizer": "q-galore"},
        {"saved": "resting"},
    ],
    ids=lambda w: "-".join(map(str, w.values())) or "master",
)
def test_a_stopped_run_gives_the_bits_of_an_unbroken_one(request_of: Any, workload: dict[str, Any]) -> None:
    whole = run_training(request_of("whole", workload=workload))
    for step in (3, 5):
        with pytest.raises(InterruptedJobError, match=f"stopped after step {step} of {STEPS}") as caught:
            run_training(request_of("broken", workload=workload), _stop_after(step))
        assert caught.value.exit_code == 130
    broken = run_training(request_of("broken", workload=workload))
    assert broken.resumed_from == 5
    assert _losses(whole.folder) == _losses(broken.folder) and len(_losses(whole.folder)) == STEPS
    last = f"checkpoints/step-{STEPS:08d}/state.safetensors"
    assert _same_bits(whole.folder / last, broken.folder / last)
    lora = workload.get("method") in ("lora", "qlora")
    name = "adapter/adapter_model.safetensors" if lora else "model/model.safetensors"
    name = "side/side_network.safetensors" if workload.get("method") == "side" else name
    assert _same_bits(whole.folder / name, broken.folder / name)


def test_a_damaged_checkpoint_is_found_and_the_one_before_it_used(request_of: Any, tmp_path: Path) -> None:
    whole = run_training(request_of("whole"))
    with pytest.raises(InterruptedJobError):
        run_training(request_of(), _stop_after(6))
    newest = tmp_path / "run" / "checkpoints" / "step-00000006" / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    result = run_training(request_of())
    assert result.resumed_from == 4 and any("damaged in tensor" in note for note in result.notes)
    assert _losses(result.folder) == _losses(whole.folder)


def test_another_model_data_or_plan_is_refused_unless_told(request_of: Any, tmp_path: Path) -> None:
    with pytest.raises(InterruptedJobError):
        run_training(request_of(), _stop_after(2))
    other = tmp_path / "other.txt"
    other.write_text("something else entirely\n" * 200)
    with pytest.raises(UsageError, match="the data changed"):
        run_training(request_of(files=(other,)))
    with pytest.raises(UsageError, match=r"what was asked changed \(learning_rate 0.001 became 0.5\)"):
        run_training(request_of(settings={"learning_rate": 0.5}))
    with pytest.raises(UsageError, match=r"planned to peak at .* but the budget is now"):
        run_training(request_of(budget_bytes=2**20))
    assert run_training(request_of(files=(other,), resume_anyway=True)).resumed_from == 2
    with pytest.raises(OutputError, match="holds a finished run"):
        run_training(request_of())


def test_a_loss_that_breaks_stops_with_step_rows_and_last_good_checkpoint(
    request_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from haversack.engine.training_step import TrainingStep

    real, calls = TrainingStep.micro_step, []

    def breaks(self: Any, **batch: Any) -> torch.Tensor:
        calls.append(1)
        loss = real(self, **batch)
        return loss * float("nan") if len(calls) == 10 else loss  # the second micro-batch of step 5

    monkeypatch.setattr(TrainingStep, "micro_step", breaks)
    with pytest.raises(
        LossError, match=r"nan at step 5 of 8, in a batch of prose.txt:\d+.*last good checkpoint is of step 4"
    ):
        run_training(request_of(settings={"holdout": 0.0}))
    monkeypatch.setattr(TrainingStep, "micro_step", real)
    assert run_training(request_of(settings={"holdout": 0.0})).resumed_from == 4


def test_a_full_disk_while_saving_is_told_and_tried_again(
    request_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = safetensors_file._write_all, []

    def full(fd: int, piece: Any, offset: int) -> None:
        if threading.current_thread().name == "checkpoint" and len(failed) < 2:
            failed.append(offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, piece, offset)

    monkeypatch.setattr(train_loop, "LAST_SAVE_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(safetensors_file, "_write_all", full)
    result = run_training(request_of())
    assert len(failed) == 2 and result.steps == STEPS
    assert sum("could not be written, training goes on" in note for note in result.notes) == 2
    assert checkpoints.newest_intact(tmp_path / "run" / "checkpoints")[0].step == STEPS  # type: ignore[union-attr]
    assert _losses(result.folder) == _losses(run_training(request_of("whole")).folder)


def test_memory_that_runs_out_halves_the_micro_batch_and_says_so(
    request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from haversack.engine.training_step import TrainingStep

    real = TrainingStep.micro_step

    def tight(self: Any, ids: torch.Tensor, **rest: Any) -> torch.Tensor:
        if len(ids) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(self, ids, **rest)

    monkeypatch.setattr(TrainingStep, "micro_step", tight)
    result = run_training(request_of(settings={"holdout": 0.0}))
    assert any("micro-batches of 1 rows instead of 2" in note for note in result.notes) and result.steps == STEPS


def test_predictions_of_what_stays_are_exact(request_of: Any) -> None:
    result = run_training(request_of(workload={"method": "lora", "lora_rank": 2})).to_dict()
    for owner, pair in result["resident_bytes"].items():
        frequencies = (
            64 if owner == "weights" else 0
        )  # the rotary embedding's buffers are in 32 bits, whatever the model's dtype
        assert pair["predicted"] == pytest.approx(pair["measured"], abs=frequencies), owner


def test_nothing_fits_and_says_so_before_it_starts(request_of: Any, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        run_training(request_of(budget_bytes=2**20))
    assert caught.value.shortfall_bytes > 0 and "would do" in (caught.value.cheapest_change or "")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose chosen answer is always the same, and two rows that can't be used."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"{n} {n + 1}", "chosen": " and so on", "rejected": f" {n}"} for n in range(24)]
    bad = [{"prompt": "7", "chosen": " 8", "rejected": " 8"}, {"prompt": "7", "chosen": " 8"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *bad]))
    return file


def test_pairs_are_found_and_the_chosen_answers_come_to_be_preferred(
    request_of: Any, pairs: Path, tmp_path: Path
) -> None:
    """By DPO, unasked: the first loss is log 2, for nothing has moved from the reference yet."""
    asked: dict[str, Any] = {"files": (pairs,), "workload": {"precision": "fp32"},
                             "settings": {"learning_rate": 3e-2, "schedule": "constant", "warmup": 0.0}}  # fmt: skip
    result = run_training(request_of(**asked))
    assert result.plan.workload["objective"] == "dpo" and result.plan.workload["samples_apart"]
    assert result.num_samples == 24 and result.num_bad_rows == 2
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "run" / "bad-rows.jsonl").read_text().splitlines()]
    assert "answer are the same" in reasons[0] and "none of" in reasons[1]
    losses = _losses(result.folder)
    assert losses[1] == pytest.approx(0.6931, abs=2e-2) and losses[STEPS] < 0.5  # dropout moves the first a little
    assert result.final["preferred"] == 1.0 and "eval_preferred" in result.final
    assert "reference" in result.plan.ledger.timeline
    with pytest.raises(InterruptedJobError):
        run_training(request_of("broken", **asked), _stop_after(3))
    assert _losses(run_training(request_of("broken", **asked)).folder) == losses


def test_pairs_without_a_reference(request_of: Any, pairs: Path, tmp_path: Path) -> None:
    result = run_training(
        request_of(
            files=(pairs,),
            workload={"objective": "logo", "method": "lora"},
            settings={"learning_rate": 3e-2, "warmup": 0.0},
        )
    )
    assert not list((tmp_path / "run").glob("reference-*")) and "reference" not in result.plan.ledger.timeline
    assert _losses(result.folder)[STEPS] < _losses(result.folder)[1]


def test_a_loss_that_the_data_is_not_for_is_refused(request_of: Any, pairs: Path) -> None:
    with pytest.raises(
        UsageError, match="the loss logo compares a chosen with a rejected answer, but the data is text"
    ):
        run_training(request_of(workload={"objective": "logo"}))
    with pytest.raises(UsageError, match="the data has pairs of them"):
        run_training(request_of("other", files=(pairs,), workload={"objective": "likelihood"}))
