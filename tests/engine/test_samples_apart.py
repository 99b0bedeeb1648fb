"""Samples side by side in a row: they don't see one another, and what the mask takes is predicted."""

from __future__ import annotations

import pytest
import torch
from tests.describe.families import FAMILIES

from haversack.describe.model import describe_model
from haversack.describe.workload import TrainWorkload
from haversack.engine.training_step import TrainingStep
from haversack.jobs.training_run import open_model


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2"])
def test_samples_of_a_row_do_not_see_one_another(family: str) -> None:
    described = describe_model({**FAMILIES[family], "dtype": "float32"})
    model = open_model(described, torch.float32, "eager" if family == "gemma2" else "sdpa").eval()
    one, other = torch.randint(3, 70, (2, 1, 12), generator=torch.Generator().manual_seed(0))
    together = torch.cat([one, other], 1)
    positions = torch.arange(12).repeat(2)[None]
    with torch.no_grad():
        packed = model(together, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(ids, use_cache=False).logits for ids in (one, other)], 1)
        mixed = model(together, use_cache=False).logits
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(mixed[:, 12:], alone[:, 12:], atol=1e-2)


def test_the_loss_is_the_mean_over_what_is_trained_on() -> None:
    described = describe_model({**FAMILIES["llama"], "dtype": "float32"})
    step = TrainingStep(open_model(described, torch.float32, "sdpa"), described, TrainWorkload(2, 12, precision="fp32"))
    ids = torch.randint(3, 70, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :7] = labels[1, 3:] = -100
    with torch.no_grad():
        found = step.loss(ids, labels)
        nats = torch.log_softmax(step.model(ids).logits[:, :-1].float(), -1).gather(-1, ids[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(found, -nats[counted].mean())


def test_micro_batches_add_up_to_the_step_however_it_is_cut() -> None:
    described = describe_model({**FAMILIES["llama"], "dtype": "float32"})
    ids = torch.randint(3, 70, (4, 12), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, 2:] = labels[3, :9] = -100  # rows of very different weight
    grads = []
    for size in (4, 2, 1):
        step = TrainingStep(
            open_model(described, torch.float32, "sdpa"), described, TrainWorkload(size, 12, precision="fp32")
        )
        total = int((labels[:, 1:] != -100).sum())
        for start in range(0, 4, size):
            rows = slice(start, start + size)
            step.micro_step(ids[rows], labels[rows], share=int((labels[rows, 1:] != -100).sum()) / total)
        grads.append(torch.cat([p.grad.flatten() for p in step.trained if p.grad is not None]))
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(grads[2], grads[0], atol=1e-6, rtol=1e-4)
