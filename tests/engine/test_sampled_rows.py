"""Sampled rows: gradients right on average, with less variance than drawing alone, and the bytes of the share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.describe.families import FAMILIES
from tests.engine.chain import LENGTH, ROWS, Chain, held_back, pretrained, trained

from haversack.cost.training import training_cost
from haversack.describe.model import describe_model
from haversack.describe.workload import TrainWorkload, TuneWorkload
from haversack.engine.sampled_rows import SampleRows, choose_rows
from haversack.engine.training_step import TrainingStep
from haversack.errors import UsageError
from haversack.jobs.training_run import measure_tensors, open_model

CONFIG = {**FAMILIES["llama"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
WORKLOAD = TrainWorkload(4, 32, precision="fp32", saved="sampled")


def test_right_on_average_and_winners_vary_less() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator) * torch.logspace(0, -2, 40)[:, None]
    grad = torch.randn(40, 5, generator=generator)
    exact = grad.T @ x
    variances = []
    for winners in (True, False):
        torch.manual_seed(0)
        draws = []
        for _ in range(3000):
            rows, weights = choose_rows(x, 0.3, winners=winners)
            assert len(rows) == 12
            draws.append(grad[rows].T @ (x[rows] * weights[:, None]))
        stacked = torch.stack(draws)
        error = stacked.std(0) / len(draws) ** 0.5
        assert ((stacked.mean(0) - exact).abs() < 5 * error + 1e-6).all()
        variances.append(float(stacked.var(0).sum()))
    assert variances[0] < 0.8 * variances[1]


def test_few_rows_are_kept_and_the_model_is_given_back() -> None:
    model = open_model(describe_model(CONFIG), torch.float32, "sdpa").train()
    ids = torch.randint(3, 60, (4, 32), generator=torch.Generator().manual_seed(0))
    exact = model(input_ids=ids, labels=ids, use_cache=False).loss
    with SampleRows(model, 0.25):
        sampled = model(input_ids=ids, labels=ids, use_cache=False).loss
        sampled.backward()
    assert torch.equal(sampled, exact)
    assert "forward" not in model.model.layers[0].mlp.up_proj.__dict__
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="but none is"):
        SampleRows(model)
    with pytest.raises(UsageError, match="share of rows is 1"):
        SampleRows(model, 1)
    with pytest.raises(UsageError, match="method lora"):
        TuneWorkload(1, 8, saved="sampled", method="lora")


def test_it_trains_and_holds_what_was_traced() -> None:
    described = describe_model(CONFIG)
    step = TrainingStep(open_model(described, torch.float32, "sdpa"), described, WORKLOAD).begin(described)
    for group in step.optimizer.optimizers[0].param_groups:
        group["lr"] = 1e-2
    ids = torch.randint(3, 60, (4, 32), generator=torch.Generator().manual_seed(0))
    losses = [step.run([{"ids": ids}]) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.2
    cost, whole = (training_cost(described, w) for w in (WORKLOAD, replace(WORKLOAD, saved="exact")))
    measured = measure_tensors(CONFIG, WORKLOAD)["tensor_peaks"]["step 1"]
    assert measured == pytest.approx(
        max(cost.ledger().total_bytes(p) for p in ("forward", "loss", "backward")), rel=0.01, abs=64 << 10
    )
    assert cost.tensor_peak_bytes < whole.tensor_peak_bytes


def test_inputs_kept_are_the_share_and_the_loss_is_near_the_exact_one() -> None:
    linear_input = torch.randn(2, 50, 64, requires_grad=True)
    model = open_model(describe_model(CONFIG), torch.float32, "sdpa").train()
    linear = model.model.layers[0].mlp.up_proj
    kept: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t)
    with SampleRows(model, 0.25), hooks:
        linear(linear_input)
    (values,) = [t for t in kept if t.is_floating_point() and t is not linear.weight]
    assert values.nbytes == linear_input.nbytes / 4
    chain = Chain(1, kept=0.5)
    found = {}
    for saved in ("sampled", "exact"):
        workload = TuneWorkload(ROWS, LENGTH, method="full", precision="fp32", saved=saved)
        found[saved] = held_back(trained(workload, chain, steps=30, lr=3e-3, weights=pretrained())[0], chain)
    workload = TuneWorkload(ROWS, LENGTH, method="full", precision="fp32")
    before = held_back(trained(workload, chain, steps=0, lr=0.0, weights=pretrained())[0], chain)
    assert before - found["sampled"] > 0.9 * (before - found["exact"]), (before, found)
