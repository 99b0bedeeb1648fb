"""Bases that are packed as they are read: the same as packed after loading, with one matrix there at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.engine.tiny import random_ids, save_tiny

from haversack.cost.training import training_cost
from haversack.describe.model import describe_model
from haversack.describe.workload import TuneWorkload
from haversack.engine.training_step import TrainingStep
from haversack.jobs.training_run import measure_tensors, open_for, open_model

WORKLOAD = TuneWorkload(1, 16, method="qlora", lora_rank=2, precision="fp32")


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma2"])
def test_reading_one_by_one_gives_the_same_model(family: str, tmp_path: Path) -> None:
    described = describe_model(save_tiny(family, tmp_path / "m"))
    attention = "eager" if family == "gemma2" else "sdpa"
    workload = replace(WORKLOAD, attention=attention)
    steps = []
    for model, read in (
        (open_model(described, torch.float32, attention), None),
        open_for(described, workload, torch.float32),
    ):
        torch.manual_seed(0)
        steps.append(TrainingStep(model, described, workload, read=read).begin(described))
    whole, streamed = steps
    assert not any(t.is_meta for t in (*streamed.model.parameters(), *streamed.model.buffers()))
    expected, found = (dict([*step.model.named_parameters(), *step.model.named_buffers()]) for step in steps)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    losses = []
    for step in (whole, streamed):
        torch.manual_seed(1)  # of what gpt2 drops
        losses.append(float(step.micro_step(random_ids(1, 16))))
    assert losses[0] == losses[1]


def test_the_planned_loading_peak_is_what_the_allocator_reports(tmp_path: Path) -> None:
    described = describe_model(save_tiny("llama", tmp_path / "m", num_layers=6))
    planned = training_cost(described, WORKLOAD).ledger().total_bytes("load")
    measured = measure_tensors(str(tmp_path / "m"), WORKLOAD)["tensor_peaks"]["load"]
    unpacked = 4 * described.num_parameters
    assert measured <= planned + (64 << 10)
    assert planned < 0.8 * unpacked  # not all matrices are there at once


def test_models_with_stacked_experts_are_loaded_whole(tmp_path: Path) -> None:
    described = describe_model(save_tiny("mixtral", tmp_path / "m"))
    _, read = open_for(described, WORKLOAD, torch.float32)
    assert read is None
