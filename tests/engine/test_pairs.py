"""Pairs side by side in a row: each answer's log-likelihood is what it would be alone, however its logits come about."""

from __future__ import annotations

import math

import pytest
import torch
from tests.describe.families import FAMILIES

from haversack.describe.model import describe_model
from haversack.describe.workload import TuneWorkload
from haversack.engine.pairs import Pairs
from haversack.engine.training_step import TrainingStep
from haversack.jobs.training_run import open_model

ANSWERS = [[5, 9, 11, 3, 8], [5, 9, 11, 7], [4, 6, 30], [4, 6, 31, 32, 33, 34]]
"""Two pairs; the first two tokens of each are the prompt."""


def row(padding: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Pairs]:
    ids = torch.tensor([[t for answer in ANSWERS for t in answer] + [0] * padding])
    labels = torch.tensor([[t for a in ANSWERS for t in [-100, -100, *a[2:]]] + [-100] * padding])
    positions = torch.tensor([[i for a in ANSWERS for i in range(len(a))] + [*range(padding)]])
    sequences = torch.tensor([[n for n, a in enumerate(ANSWERS) for _ in a] + [0] * padding])
    return ids, labels, positions, Pairs(sequences, 2)


@pytest.mark.parametrize("loss", ["fp32", "native", "cut"])
def test_answers_in_a_row_are_as_likely_as_alone(loss: str) -> None:
    described = describe_model(FAMILIES["llama"])
    workload = TuneWorkload(1, 21, method="full", precision="fp32", objective="dpo", samples_apart=True, loss=loss)
    model = open_model(described, torch.float32, "sdpa")
    step = TrainingStep(model, described, workload).begin(described)
    ids, labels, positions, pairs = row()
    with torch.no_grad():
        found = step.log_likelihoods(ids, labels, positions, pairs).flatten()
        alone = []
        for answer in ANSWERS:
            likely = model(input_ids=torch.tensor([answer]), use_cache=False).logits.log_softmax(-1)[0]
            alone.append(sum(float(likely[i - 1, answer[i]]) for i in range(2, len(answer))))
    assert found.tolist() == pytest.approx(alone, rel=1e-5)
    given = Pairs(pairs.sequences, 2, found)
    assert float(step.loss(ids, labels, positions, given).detach()) == pytest.approx(math.log(2))
    assert step.preferred is not None and float(step.preferred) == 0.0
    for _ in range(5):
        step.run([{"ids": ids, "labels": labels, "positions": positions, "pairs": given}])
    with torch.no_grad():
        gained = (step.log_likelihoods(ids, labels, positions, pairs).flatten() - found).view(2, 2)
    assert bool((gained[:, 0] > gained[:, 1]).all())
