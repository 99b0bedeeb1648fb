"""Updates during the backward pass: the same weights to the bit, and gradients that never exist together."""

from __future__ import annotations

import pytest
import torch
from tests.describe.families import FAMILIES
from torch import nn

from haversack.describe.model import describe_model
from haversack.describe.workload import TrainWorkload
from haversack.engine.optimizers import make_optimizer
from haversack.engine.training_step import TrainingStep
from haversack.engine.update_in_backward import UpdateInBackward
from haversack.errors import UsageError
from haversack.jobs.training_run import open_model


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"optimizer": "adamw8bit", "recompute": "full"}),
        ("llama-tied", {"optimizer": "galore", "precision": "fp32", "loss": "cut"}),
        ("qwen2", {"precision": "master", "optimizer": "muon"}),
    ],
)
def test_the_same_weights_to_the_bit(family: str, fields: dict[str, str]) -> None:
    described = describe_model(FAMILIES[family])
    ids = torch.randint(3, 72, (2, 16), generator=torch.Generator().manual_seed(0))
    trained = []
    for update in ("step", "backward"):
        workload = TrainWorkload(2, 16, update=update, **fields)
        dtype = torch.float32 if workload.weights_dtype == "F32" else torch.bfloat16
        step = TrainingStep(open_model(described, dtype, "sdpa"), described, workload).begin(described)
        for _ in range(3):
            step.micro_step(ids)
            assert update == "step" or all(p.grad is None for p in step.trained)
            step.update()
        trained.append([p.detach().clone() for p in step.trained])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_gradients_never_exist_together() -> None:
    net = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(6)))
    parameters = list(net.parameters())
    held: list[int] = []
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: held.append(sum(q.grad is not None for q in parameters)))
    with UpdateInBackward(parameters, make_optimizer("sgdm", parameters, parameters)):
        net(torch.randn(3, 16)).square().sum().backward()
    assert held == [1] * 6 and all(p.grad is None for p in parameters)
    net(torch.randn(3, 16)).square().sum().backward()
    assert held[6:] == [1, 2, 3, 4, 5, 6]


def test_clipping_is_by_tensor_and_said() -> None:
    weight = nn.Parameter(torch.ones(4))
    with UpdateInBackward([weight], make_optimizer("sgdm", [weight], lr=1.0), clip_tensor_norm=0.5):
        (weight * torch.full((4,), 100.0)).sum().backward()
    assert float((torch.ones(4) - weight.detach()).norm()) == pytest.approx(0.5)
    with pytest.raises(UsageError, match="clip_tensor_norm is 0"):
        UpdateInBackward([weight], make_optimizer("sgdm", [weight]), clip_tensor_norm=0)
