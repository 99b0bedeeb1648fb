"""Tuning beside a packed folder: gradients pass through packed matrices as through the values that they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine.tiny import save_tiny

from haversack.cost.damage import NONE, Damage
from haversack.describe.machine import Machine
from haversack.describe.model import describe_model
from haversack.describe.workload import ServeWorkload, TuneWorkload
from haversack.engine.packed_base import describe_packed_base, freeze_packed
from haversack.engine.packed_tensor import packed_parameters
from haversack.engine.training_step import TrainingStep
from haversack.jobs.pack import pack
from haversack.jobs.training_run import open_model
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.plan.make import make_plan
from haversack.plan.question import Question

FOUR = WeightOption(grid=IntegerGrid(4, 64, symmetric=False), rounding=NearestRounding())


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def packed_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers whose matrices are mostly at 4 bits."""
    folder = tmp_path_factory.mktemp("packed")
    model = describe_model(save_tiny(request.param, folder / "model"))
    damages = {WeightOption(): NONE, FOUR: Damage(0.1, "proxied")}
    question = Question(
        model=model,
        workload=ServeWorkload(24, 9),
        machine=Machine("test", 2, 2**33, 2**33),
        budget_bytes=int(model.num_bytes * 0.6) + 2**15,
        budget_kind="tensor",
        placement="resident",
        weight_damages={site.id: damages for site in model.weights},
    )
    pack(model, make_plan(question).require_fit(), folder / "out")
    return folder / "out"


def test_gradients_pass_through_packed_matrices(packed_folder: Path) -> None:
    described, base_bytes = describe_packed_base(packed_folder)
    model = open_model(described, torch.float32, "sdpa")
    freeze_packed(model, "sdpa")
    step = TrainingStep(model, described, TuneWorkload(1, 8, precision="fp32", method="qlora", lora_rank=2))
    ids = torch.randint(3, 70, (2, 8), generator=torch.Generator().manual_seed(0))
    step.begin(described)
    first = float(step.micro_step(ids))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith(".up"))
    step.optimizer.optimizers[0].param_groups[0]["lr"] = 1e-2
    step.update()
    for _ in range(20):
        last = float(step.micro_step(ids))
        step.update()
    assert last < first - 0.1
    held = step.residents()["packed weights"]
    assert sum({t.data_ptr(): t.nbytes for t in held}.values()) == base_bytes["packed weights"]


def test_the_gradient_is_that_of_the_values(packed_folder: Path) -> None:
    described, _ = describe_packed_base(packed_folder)
    model = open_model(described, torch.float32, "sdpa")
    freeze_packed(model, "sdpa")
    for parameter in packed_parameters(model):
        for block in parameter.blocks:
            matrix = block.matrix
            x = torch.randn(3, matrix.in_features, requires_grad=True)
            grad = torch.randn(3, matrix.out_features)
            matrix.linear(x).backward(grad)
            values = matrix.option.dense(matrix.tensors(), matrix.out_features, matrix.in_features).float()
            assert x.grad is not None
            torch.testing.assert_close(x.grad, grad @ values, atol=1e-4, rtol=1e-4)
