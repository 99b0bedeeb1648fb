"""Recomputation chosen for a peak: exact against every subset of layers, kept by the real step, and the same result."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.describe.families import FAMILIES

from haversack.cost.training import training_cost
from haversack.cost.training_seconds import layer_work
from haversack.describe.model import describe_model
from haversack.describe.workload import TrainWorkload, TuneWorkload, name_layers, recomputed_layers
from haversack.engine.recompute import RecomputeLayers
from haversack.engine.training_step import TrainingStep
from haversack.errors import UsageError
from haversack.jobs.training_run import measure_tensors, open_model
from haversack.plan.recompute import choose_recomputation, moment_bytes, solve_layers

CONFIG: dict[str, Any] = {
    **FAMILIES["llama"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "head_dim": 16,
}  # fmt: skip
WORKLOAD = TrainWorkload(4, 48, optimizer="sgdm", update="backward")
"""Where activations are most of the peak."""


def test_exact_against_every_subset() -> None:
    """Least work under each cap, and the lowest peak at that work."""
    model = describe_model(CONFIG)
    kept, again = (training_cost(model, TrainWorkload(4, 48, optimizer="sgdm", recompute=r)) for r in ("none", "full"))
    stays = sum(kept.staying.values())
    peaks = {
        frozenset(layers): stays + int(moment_bytes(kept.trace, again.trace, frozenset(layers)).max())
        for n in range(6)
        for layers in itertools.combinations(range(5), n)
    }
    assert peaks[frozenset()] == max(kept.ledger().total_bytes(p) for p in ("forward", "loss", "backward"))
    assert peaks[frozenset(range(5))] == max(again.ledger().total_bytes(p) for p in ("forward", "loss", "backward"))
    work = (1.0, 2.0, 1.5, 1.0, 1.0)
    for cap in sorted(set(peaks.values()))[::4]:
        fitting = {layers: peak for layers, peak in peaks.items() if peak <= cap}
        least = min(sum(work[i] for i in layers) for layers in fitting)
        found = solve_layers(kept, again, work, cap)
        assert found is not None and sum(work[i] for i in found) == pytest.approx(least)
        lowest = min(p for layers, p in fitting.items() if sum(work[i] for i in layers) == pytest.approx(least))
        assert peaks[found] == lowest
    assert solve_layers(kept, again, work, min(peaks.values()) - 1) is None


def test_the_choice_keeps_its_peak_in_the_real_step() -> None:
    model = describe_model(CONFIG)
    kept = training_cost(model, WORKLOAD).tensor_peak_bytes
    found = choose_recomputation(model, WORKLOAD, int(0.8 * kept))
    assert found is not None
    workload, cost = found
    assert 0 < len(recomputed_layers(workload.recompute, 5)) < 5
    assert cost.tensor_peak_bytes <= 0.8 * kept
    measured = measure_tensors(CONFIG, workload)
    states = measured["residents"]["optimizer states"]
    assert states == cost.state_bytes
    assert measured["tensor_peaks"]["step 1"] == pytest.approx(cost.tensor_peak_bytes, rel=0.01, abs=32 << 10)
    whole = choose_recomputation(model, WORKLOAD, kept)
    assert whole is not None and whole[0] == WORKLOAD
    assert choose_recomputation(model, WORKLOAD, kept // 10) is None


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_beside_a_frozen_embedding(method: str) -> None:
    """Its backward pass is there only where the first layer recomputes."""
    model, workload = describe_model(CONFIG), TuneWorkload(4, 48, method=method, lora_rank=4)
    kept, again = (training_cost(model, replace(workload, recompute=r)) for r in ("none", "full"))
    found = choose_recomputation(model, workload, (kept.tensor_peak_bytes + again.tensor_peak_bytes) // 2)
    assert found is not None and 0 < len(recomputed_layers(found[0].recompute, 5)) < 5


def test_the_same_result_to_the_bit() -> None:
    described = describe_model(FAMILIES["gemma2"])
    ids = torch.randint(3, 72, (2, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for recompute in ("none", "1", "full"):
        workload = TrainWorkload(2, 16, recompute=recompute, optimizer="sgdm")
        step = TrainingStep(open_model(described, torch.bfloat16, "eager"), described, workload).begin(described)
        losses.append([step.run([{"ids": ids}]) for _ in range(3)])
    assert losses[0] == losses[1] == losses[2]


def test_a_context_manager_for_any_loop() -> None:
    model = open_model(describe_model(FAMILIES["llama"]), torch.float32, "sdpa").train()
    with RecomputeLayers(model, [1]):
        assert [layer.gradient_checkpointing for layer in model.model.layers] == [False, True]
        model(
            input_ids=torch.zeros(1, 4, dtype=torch.int64), labels=torch.zeros(1, 4, dtype=torch.int64)
        ).loss.backward()
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [False, False]


def test_layers_are_named_and_read() -> None:
    for layers in ((), (0,), (0, 1, 2), (1, 2, 5), tuple(range(8))):
        assert recomputed_layers(name_layers(layers, 8), 8) == frozenset(layers)
    assert name_layers((0, 1, 2, 5), 8) == "0-2,5"
    for wrong in ("", "3-1", "a", "1,,2", "-1"):
        with pytest.raises(UsageError, match="layers as in 0-3,7"):
            recomputed_layers(wrong)
    with pytest.raises(UsageError, match="but the model has 4 layers"):
        recomputed_layers("2-4", 4)
    assert sum(layer_work(describe_model(CONFIG))) == pytest.approx(1)
