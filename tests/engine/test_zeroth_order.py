"""Zeroth order: the slope is the gradient's along the noise, weights come back to the bit, few bytes are held, and the loss falls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.describe.families import FAMILIES

from haversack.describe.model import describe_model
from haversack.engine.trace import LiveBytes
from haversack.engine.zeroth_order import ZerothOrder
from haversack.errors import UsageError
from haversack.jobs.training_run import open_model

IDS = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(0))


def model_of() -> Any:
    return open_model(describe_model(FAMILIES["llama"]), torch.float32, "sdpa")


def loss_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def test_steps_along_the_noise_by_the_gradients_slope() -> None:
    model = model_of()
    loss_of(model).backward()
    names = [name for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = ZerothOrder(model, lr=1.0, eps=2e-3, share=0.5)
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step(lambda: loss_of(model))
    after = dict(model.named_parameters())
    moved = {name: after[name].detach() - before[name] for name in before}
    assert all(float(moved[name].abs().max()) == 0 for name in before if name not in names)
    for name in names:
        share = float((moved[name] != 0).float().mean())
        assert 0.4 < share < 0.6
        assert (
            float(before[name][moved[name] != 0].abs().max())
            <= float(before[name][moved[name] == 0].abs().min()) * 1.001
        )
    # what moved is -slope times noise of variance 1, and the slope is the gradient along the noise
    along = sum(float((gradient[name] * moved[name]).sum()) for name in names)
    length = sum(float(moved[name].square().sum()) for name in names)
    count = sum(int((moved[name] != 0).sum()) for name in names)
    assert -along == pytest.approx(length / count, rel=0.1)


def test_weights_come_back_and_little_is_held() -> None:
    model = model_of()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = ZerothOrder(model, share=0.25)
    peaks = []
    for moved in (False, True):
        with LiveBytes() as live, torch.no_grad():
            if moved:
                optimizer._loss(lambda: loss_of(model), 1e-3)
            else:
                loss_of(model)
        peaks.append(live.peak_bytes)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    widest = max(4 * p.numel() for name, p in model.named_parameters() if ".layers." in name)
    assert peaks[1] <= peaks[0] + 6 * widest
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step(broken)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def broken() -> torch.Tensor:
    raise RuntimeError("broken")


def test_the_loss_falls_and_a_resumed_run_is_the_unbroken_one() -> None:
    model = model_of()
    optimizer = ZerothOrder(model, lr=4e-3, share=1.0)
    first = float(loss_of(model).detach())
    for _ in range(40):
        optimizer.step(lambda: loss_of(model))
    assert float(loss_of(model).detach()) < first - 0.01
    again = model_of()
    ZerothOrder(again, lr=4e-3, share=1.0).step(lambda: loss_of(again))
    resumed = ZerothOrder(again, lr=4e-3, share=1.0, done=1)
    for _ in range(39):
        resumed.step(lambda: loss_of(again))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    with pytest.raises(UsageError, match="share 0"):
        ZerothOrder(model, share=0)
