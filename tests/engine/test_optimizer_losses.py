"""Optimizers against what they leave out, by loss: a small Llama trained on chains of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.chain import CONFIG, LENGTH, ROWS, Chain, trained

from haversack.describe.workload import TrainWorkload

SMALL: dict[str, Any] = {**CONFIG, "num_hidden_layers": 2}


def losses_of(workload: TrainWorkload, *, steps: int, lr: float, seed: int = 0) -> torch.Tensor:
    return torch.tensor(trained(workload, Chain(), steps=steps, lr=lr, config=SMALL, seed=seed)[1])


def test_coat_tracks_whole_states_and_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments and activations in 8-bit floats beside AdamW's in 32 bits."""
    exact = losses_of(TrainWorkload(ROWS, LENGTH, precision="fp32"), steps=60, lr=5e-3)
    coat = losses_of(TrainWorkload(ROWS, LENGTH, precision="fp32", optimizer="coat", saved="fp8"), steps=60, lr=5e-3)
    assert exact[0] - exact[-10:].mean() > 1
    assert float((coat[-10:] - exact[-10:]).mean().abs()) < 0.03
    assert float((coat - exact).abs().max()) < 0.15


def test_natural_galore_is_below_galore_at_the_same_rank() -> None:
    """After as many steps, at the better of two learning rates each, over two seeds."""
    found = {}
    for name in ("galore", "natural-galore"):
        workload = TrainWorkload(ROWS, LENGTH, precision="fp32", optimizer=name)
        by_rate = [
            sum(float(losses_of(workload, steps=60, lr=lr, seed=seed)[-10:].mean()) for seed in (0, 1)) / 2
            for lr in (5e-3, 1e-2)
        ]
        found[name] = min(by_rate)
    assert found["natural-galore"] < found["galore"], found
