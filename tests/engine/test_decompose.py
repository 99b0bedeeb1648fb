"""A base in 4 bits and adapters that begin where its error is: nearer than rounding alone, and exported as what they changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.describe.families import FAMILIES
from torch import nn
from transformers.pytorch_utils import Conv1D

from haversack.cost.training import training_cost
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.model import describe_model
from haversack.describe.workload import TuneWorkload
from haversack.engine.adapters import decompose
from haversack.engine.peft_format import WEIGHTS_NAME, adapters_of, read_adapter_config, save_adapter
from haversack.engine.training_step import TrainingStep
from haversack.jobs.training_run import measure_tensors, open_model

CONFIG = {**FAMILIES["llama"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16}
WORKLOAD = TuneWorkload(2, 24, method="lq-lora", lora_rank=4, precision="fp32")


@pytest.mark.parametrize("linear", [nn.Linear(96, 64), Conv1D(64, 96)], ids=["linear", "transposed"])
def test_the_error_is_below_roundings_and_falls_with_rank(linear: nn.Module) -> None:
    torch.manual_seed(0)
    linear.weight.data.normal_()
    matrix = linear.weight.detach().T if isinstance(linear, Conv1D) else linear.weight.detach()
    errors = []
    for rank in (1, 4, 16):
        packed, up, down = decompose(linear, matrix, rank)
        errors.append(float((matrix - packed.unpack(torch.float32) - up.float() @ down.float()).norm()))
        alone = float((matrix - packed.unpack(torch.float32)).norm())
        assert errors[-1] < alone
    assert errors[0] > errors[1] > errors[2]


def test_exports_what_was_changed(tmp_path: Path) -> None:
    described = describe_model(CONFIG)
    step = TrainingStep(open_model(described, torch.float32, "sdpa"), described, WORKLOAD).begin(described)
    name, adapter = next(iter(adapters_of(step.model).items()))
    up, down = adapter.change()
    assert up.shape[1] == 8 and float((up @ down).abs().max()) < 1e-7
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    first = adapter.up.detach().clone() @ adapter.down.detach()
    for group in step.optimizer.optimizers[0].param_groups:
        group["lr"] = 1e-2
    losses = [step.run([{"ids": ids}]) for _ in range(4)]
    assert losses[-1] < losses[0]
    save_adapter(step.model, tmp_path, "tiny")
    assert read_adapter_config(tmp_path)["r"] == 8
    saved = Checkpoint.open(tmp_path)
    assert (tmp_path / WEIGHTS_NAME).is_file()
    product = saved.read(f"base_model.model.{name}.lora_B.weight") @ saved.read(
        f"base_model.model.{name}.lora_A.weight"
    )
    assert torch.allclose(product, (adapter.up @ adapter.down).detach() - first, atol=1e-6)


def test_bytes_are_as_declared() -> None:
    wide = {**CONFIG, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}
    cost = training_cost(describe_model(wide), WORKLOAD)
    measured = measure_tensors(wide, WORKLOAD)
    assert measured["residents"] == {owner: n for owner, n in cost.staying.items() if owner != "batch"}
    assert measured["tensor_peaks"]["step 1"] == pytest.approx(
        max(cost.ledger().total_bytes(p) for p in ("forward", "loss", "backward")), rel=0.01, abs=64 << 10
    )
    assert measured["tensor_peaks"]["load"] <= cost.load_bytes + (64 << 10)
