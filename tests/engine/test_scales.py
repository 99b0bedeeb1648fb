"""Trained scales: gradients are the whole matrix's summed by group, codes never change, and saved scales give the same answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.describe.families import FAMILIES
from tests.engine.chain import LENGTH, ROWS, Chain, held_back, pretrained, trained

from haversack.cost.training import training_cost
from haversack.describe.model import describe_model
from haversack.describe.workload import TuneWorkload
from haversack.engine.scales import CONFIG_NAME, TrainedScales, load_scales, save_scales, scales_of
from haversack.engine.training_step import TrainingStep
from haversack.errors import CheckpointError
from haversack.jobs.training_run import measure_tensors, open_model

CONFIG = {**FAMILIES["llama"], "hidden_size": 80, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16}
"""80 columns: the second group is padded."""

WORKLOAD = TuneWorkload(2, 24, method="peqa", precision="fp32")
IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))


def tuned(steps: int) -> tuple[TrainingStep, list[float]]:
    described = describe_model(CONFIG)
    step = TrainingStep(open_model(described, torch.float32, "sdpa"), described, WORKLOAD).begin(described)
    for group in step.optimizer.optimizers[0].param_groups:
        group["lr"] = 1e-2
    return step, [step.run([{"ids": IDS}]) for _ in range(steps)]


def test_gradients_are_the_whole_matrix_summed_by_group() -> None:
    step, _ = tuned(0)
    module = next(iter(scales_of(step.model).values()))
    x = torch.randn(2, 5, module.in_features, requires_grad=True)
    module(x).square().sum().backward()
    assert module.scales.grad is not None and x.grad is not None
    found, back = module.scales.grad.clone(), x.grad.clone()
    x.grad = None
    scales = module.scales.detach().clone().requires_grad_()
    integers = module.integers(slice(None))
    matrix = (integers * scales[..., None]).flatten(1)[:, : module.in_features]
    (x @ matrix.T).square().sum().backward()
    assert scales.grad is not None and torch.allclose(found, scales.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(back, x.grad, atol=1e-5)


def test_only_scales_change_and_they_come_back(tmp_path: Path) -> None:
    step, losses = tuned(8)
    fresh, _ = tuned(0)
    for name, module in scales_of(step.model).items():
        assert torch.equal(module.codes, scales_of(fresh.model)[name].codes)
        assert not torch.equal(module.scales, scales_of(fresh.model)[name].scales)
    assert {id(p) for p in step.trained} == {id(m.scales) for m in scales_of(step.model).values()}
    assert losses[-1] < losses[0] - 0.1
    save_scales(step.model, tmp_path, "tiny", WORKLOAD.lora_targets)
    described = describe_model(CONFIG)
    model = open_model(described, torch.float32, "sdpa")
    load_scales(model, described, tmp_path)
    step.model.eval(), model.eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, step.model(IDS).logits)
    load_scales(model, described, tmp_path)  # once packed, others of the same base are swapped in
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**config, "grid": {"bits": 3, "group_size": 64}}))
    with pytest.raises(CheckpointError, match="scales of the grid"):
        load_scales(model, described, tmp_path)
    (tmp_path / CONFIG_NAME).write_text("{")
    with pytest.raises(CheckpointError, match="no readable scales_config"):
        load_scales(model, described, tmp_path)


def test_bytes_are_those_of_scales_alone() -> None:
    cost = training_cost(describe_model(CONFIG), WORKLOAD)
    step, _ = tuned(1)
    count = sum(module.scales.numel() for module in scales_of(step.model).values())
    assert cost.trace.gradient_bytes == 4 * count == cost.staying["adapters"]
    assert all(not isinstance(m, TrainedScales) or m.codes.dtype == torch.uint8 for m in step.model.modules())
    measured = measure_tensors(CONFIG, WORKLOAD)
    assert measured["residents"] == {owner: n for owner, n in cost.staying.items() if owner != "batch"}
    assert measured["tensor_peaks"]["step 1"] == pytest.approx(
        max(cost.ledger().total_bytes(p) for p in ("forward", "loss", "backward")), rel=0.01, abs=64 << 10
    )


def test_what_rounding_lost_comes_back() -> None:
    """Tuned on the chain that the model knew before it was rounded to the nearest 4-bit integers."""
    chain = Chain()
    workload = TuneWorkload(ROWS, LENGTH, method="peqa", precision="fp32")
    whole = TuneWorkload(ROWS, LENGTH, method="full", precision="fp32")
    known = held_back(trained(whole, chain, steps=0, lr=0.0, weights=pretrained())[0], chain)
    rounded = held_back(trained(workload, chain, steps=0, lr=0.0, weights=pretrained())[0], chain)
    recovered = held_back(trained(workload, chain, steps=30, lr=1e-3, weights=pretrained())[0], chain)
    assert recovered - known < 0.5 * (rounded - known), (known, rounded, recovered)
