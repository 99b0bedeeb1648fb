"""Text with something to learn, made on the spot: chains of tokens, each followed by one of three; and small models trained on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from tests.describe.families import FAMILIES

from haversack.describe.model import describe_model
from haversack.describe.workload import TrainingWorkload, TrainWorkload
from haversack.engine.training_step import DTYPES, TrainingStep
from haversack.jobs.training_run import open_model

ROWS, LENGTH = 8, 32
CONFIG: dict[str, Any] = {
    **FAMILIES["llama"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "head_dim": 16,
}


class Chain:
    """Tokens from 3 to 59 and their followers, drawn by `followers`; of those of the first chain the share `kept` stays."""

    def __init__(self, followers: int = 0, kept: float = 0.0):
        first, other = (torch.randint(3, 60, (72, 3), generator=_seeded(seed)) for seed in (0, followers))
        stays = torch.rand(72, generator=_seeded(followers)) < kept
        self.followers = torch.where(stays[:, None], first, other)

    def rows(self, seed: int, rows: int = ROWS, length: int = LENGTH) -> torch.Tensor:
        """int64 `(rows, length)`."""
        generator = _seeded(1000 + seed)
        ids = torch.randint(3, 60, (rows, length), generator=generator)
        for place in range(1, length):
            ids[:, place] = self.followers[ids[:, place - 1], torch.randint(0, 3, (rows,), generator=generator)]
        return ids


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def pretrained() -> dict[str, torch.Tensor]:
    """Weights of a model of `CONFIG` that knows the first chain."""
    step, _ = trained(TrainWorkload(ROWS, LENGTH, precision="fp32"), Chain(), steps=50, lr=1e-2)
    return {name: tensor.clone() for name, tensor in step.model.state_dict().items()}


def trained(
    workload: TrainingWorkload,
    chain: Chain,
    *,
    steps: int,
    lr: float,
    weights: dict[str, torch.Tensor] | None = None,
    config: dict[str, Any] = CONFIG,
    seed: int = 0,
    prepare: Callable[[TrainingStep], object] = lambda step: None,
) -> tuple[TrainingStep, list[float]]:
    """The step after training, and each step's loss; from `weights` (else random ones), on rows that differ by step."""
    described = describe_model(config)
    model = open_model(described, DTYPES[workload.weights_dtype], workload.attention, seed=seed)
    if weights is not None:
        model.load_state_dict(weights)
    torch.manual_seed(seed)
    step = TrainingStep(model, described, workload)
    prepare(step)
    step.begin(described)
    groups = [group for optimizer in step.optimizer.optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = lr
    losses = [step.run([{"ids": chain.rows(seed * 10_000 + number)}]) for number in range(steps)]
    return step, losses


@torch.no_grad()
def held_back(step: TrainingStep, chain: Chain) -> float:
    """The loss on rows that nothing was trained on."""
    step.model.eval()
    loss = float(step.loss(chain.rows(-1, rows=32)))
    step.model.train()
    return loss
