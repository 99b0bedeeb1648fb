"""Chosen connections: gradients are full tuning's at these columns, and of inputs only those are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.describe.families import FAMILIES
from tests.engine.chain import LENGTH, ROWS, Chain, held_back, pretrained, trained
from torch import nn
from transformers.pytorch_utils import Conv1D

from haversack.cost.training import training_cost
from haversack.describe.model import describe_model
from haversack.describe.workload import TuneWorkload
from haversack.engine.connections import PartialConnections, connections_of, release
from haversack.engine.training_step import TrainingStep
from haversack.jobs.training_run import open_model


@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 7), lambda: Conv1D(7, 12)], ids=["linear", "transposed"])
def test_gradients_are_those_of_the_whole_matrix_at_its_columns(make: Any) -> None:
    torch.manual_seed(0)
    base = make()
    x = torch.randn(2, 5, 12, requires_grad=True)
    base(x).square().sum().backward()
    weight, inputs = base.weight.grad.clone(), x.grad.clone()
    x.grad = base.weight.grad = None
    base.requires_grad_(False)
    module = PartialConnections(base, 7, 12, 4, torch.float32)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module(x)
    assert [tuple(tensor.shape) for tensor in kept] == [(2, 5, 4)]  # of 12 columns
    y.square().sum().backward()
    whole = weight.T if isinstance(base, Conv1D) else weight
    assert module.weight.grad is not None and base.weight.grad is None
    assert torch.allclose(module.weight.grad, whole[:, module.columns], atol=1e-5)
    assert x.grad is not None and torch.allclose(x.grad, inputs, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_the_chosen_columns_change_and_the_model_gets_its_linears_back(family: str) -> None:
    described = describe_model(FAMILIES[family])
    workload = TuneWorkload(2, 8, method="paca", lora_rank=3, precision="fp32")
    model = open_model(described, torch.float32, "sdpa")
    names = set(model.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = TrainingStep(model, described, workload).begin(described)
    columns = {name: module.columns for name, module in connections_of(model).items()}
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    losses = [step.run([{"ids": ids}]) for _ in range(12)]
    assert losses[-1] < losses[0]
    release(model)
    after = model.state_dict()
    assert set(after) == names
    for name, tensor in after.items():
        changed = (tensor != before[name]).nonzero()
        linear = name.removesuffix(".weight")
        if linear not in columns:
            assert not len(changed), name
            continue
        axis = 0 if family == "gpt2" else 1
        assert set(changed[:, axis].tolist()) == set(columns[linear].tolist()), name


def test_less_is_held_than_beside_adapters_of_the_same_rank() -> None:
    described = describe_model({**FAMILIES["llama"], "hidden_size": 64, "intermediate_size": 96, "head_dim": 16})
    peaks = {
        method: training_cost(described, TuneWorkload(2, 64, method=method, lora_rank=4)).tensor_peak_bytes
        for method in ("lora", "paca")
    }
    assert peaks["paca"] < 0.9 * peaks["lora"], peaks


def test_the_loss_is_comparable_to_adapters_of_the_same_rank() -> None:
    """Each at the better of two learning rates."""
    chain = Chain(1, kept=0.5)
    found = {}
    for method, rates in (("lora", (1e-2, 2e-2)), ("paca", (2e-2, 3e-2))):
        workload = TuneWorkload(ROWS, LENGTH, method=method, lora_rank=8, precision="fp32")
        runs = [trained(workload, chain, steps=30, lr=lr, weights=pretrained())[0] for lr in rates]
        found[method] = min(held_back(step, chain) for step in runs)
    before = held_back(trained(workload, chain, steps=0, lr=0.0, weights=pretrained())[0], chain)
    assert before - found["paca"] > 0.9 * (before - found["lora"]), (before, found)
