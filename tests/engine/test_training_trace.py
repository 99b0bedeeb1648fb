"""A training step traced without memory, against what torch's allocator reports for the real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.describe.families import FAMILIES

from haversack.describe.model import describe_model
from haversack.describe.workload import TrainingWorkload, TrainWorkload, TuneWorkload
from haversack.engine.trace import OwnedBytes
from haversack.engine.training_trace import BACKWARD, compose, compose_evaluation, trace_training
from haversack.jobs.training_run import measure_tensors


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """A config of the family whose layers' activations are more than odds and ends."""
    config = dict(FAMILIES[family])
    if family == "gpt2":
        return {**config, "n_embd": 64, "n_layer": 5, **changes}
    return {**config, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "head_dim": 16, **changes}


def predicted_peaks(config: dict[str, Any], workload: TrainingWorkload, state_bytes: int) -> tuple[int, int, int]:
    """The most bytes of tensors in the batch's passes, in the update, and while a batch is evaluated."""
    trace = trace_training(describe_model(config), workload)
    stays = sum(trace.resident_bytes.values()) + state_bytes + 8 * workload.step_tokens
    passes = stays + max(moment.num_bytes for moment in compose(trace))
    update = stays + trace.gradient_bytes + trace.update_bytes if workload.update == "step" else stays
    evaluation = stays + max(moment.num_bytes for moment in compose_evaluation(trace))
    return passes, update, evaluation


@pytest.mark.parametrize(
    ("family", "workload"),
    [
        ("llama", TrainWorkload(2, 48)),
        ("llama", TrainWorkload(2, 48, precision="autocast", attention="eager", recompute="full")),
        ("llama", TrainWorkload(2, 48, precision="master", optimizer="muon", accumulation_steps=2)),
        ("gemma2", TrainWorkload(2, 48, precision="fp32", attention="eager", optimizer="adafactor")),
        ("qwen3_moe", TrainWorkload(2, 48, optimizer="adamw8bit")),
        ("llama", TrainWorkload(2, 48, optimizer="galore", loss="cut")),
        ("gemma2", TrainWorkload(2, 48, precision="autocast", optimizer="apollo", loss="cut", attention="eager")),
        ("llama", TrainWorkload(2, 48, update="backward", recompute="full", precision="master")),
        ("llama-tied", TrainWorkload(2, 48, update="backward", precision="fp32", optimizer="galore8bit", loss="cut")),
        ("gpt2", TuneWorkload(2, 48, method="lora", lora_rank=4, precision="autocast")),
        ("llama", TrainWorkload(2, 48, precision="fp32", saved="8bit")),
        ("gemma2", TrainWorkload(2, 48, saved="disk", attention="eager")),
        ("llama", TuneWorkload(2, 48, method="paca", lora_rank=4, precision="master")),
        ("llama", TuneWorkload(2, 48, method="full", objective="dpo", samples_apart=True)),
        (
            "gemma2",
            TuneWorkload(
                2, 48, method="lora", objective="logo", samples_apart=True, precision="fp32", attention="eager"
            ),
        ),
        (
            "llama",
            TuneWorkload(2, 48, method="lora", objective="dpo", samples_apart=True, loss="cut", recompute="full"),
        ),
        ("qwen3", TuneWorkload(2, 48, method="qlora", lora_rank=4, recompute="full", optimizer="sgdm")),
    ],
    ids=lambda case: case if isinstance(case, str) else f"{case.precision}-{case.optimizer}",
)
def test_a_traced_step_is_what_the_allocator_reports(family: str, workload: TrainingWorkload) -> None:
    config = config_of(family)
    measured = measure_tensors(config, workload)
    states = measured["residents"].get("optimizer states", 0)
    passes, update, evaluation = predicted_peaks(config, workload, states)
    # rearranged operands of products in bfloat16, and unpacked rows, are not modelled; once in many runs the profiler missed 50 KB
    assert measured["tensor_peaks"]["step 1"] == pytest.approx(passes, rel=0.005, abs=64 << 10)
    assert measured["tensor_peaks"]["update 1"] == pytest.approx(update, rel=0.005, abs=64 << 10)
    # which peaks in a product; pairs scored by a cut loss hold less than was traced
    assert measured["tensor_peaks"]["evaluate"] < 1.005 * evaluation + (64 << 10)
    if not (workload.loss == "cut" and workload.samples_apart):
        assert measured["tensor_peaks"]["evaluate"] == pytest.approx(evaluation, rel=0.005, abs=64 << 10)


@pytest.mark.parametrize(
    "workload", [TrainWorkload(2, 32), TrainWorkload(2, 32, precision="autocast", recompute="full")]
)
def test_composed_layers_are_all_layers(workload: TrainingWorkload) -> None:
    model = describe_model(config_of("llama", num_hidden_layers=7))
    few, all_of_them = (compose(trace_training(model, workload, all_layers=whole)) for whole in (False, True))
    assert [(m.name, m.num_bytes) for m in few] == [(m.name, m.num_bytes) for m in all_of_them]
    assert sum(m.name.startswith(BACKWARD) for m in few) == 7


def test_bytes_move_with_their_owner() -> None:
    with OwnedBytes() as live:
        live.owner = "a"
        x = torch.empty(100, device="meta")
        live.cut("first")
        live.owner = "b"
        y = x + 1
        live.assign(y, "c")
        del x
        live.cut("second")
    first, second = live.segments
    assert first.end == {"a": 400} and first.rise_bytes == 400
    assert second.end == {"a": 0, "b": 0, "c": 400} and second.rise_bytes == 400
