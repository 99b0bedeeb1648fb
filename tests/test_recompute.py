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
from haversack.describe.workload import (
    KEPT_OF_RECOMPUTED,
    TrainWorkload,
    TuneWorkload,
    name_recomputation,
    recomputation,
)
from haversack.engine.recompute import RecomputeLayers
from haversack.engine.training_step import TrainingStep
from haversack.errors import UsageError
from haversack.jobs.training_run import measure_tensors, open_model
from haversack.plan.recompute import choose_recomputation, moment_bytes, solve_layers

CONFIG: dict[str, Any] = {
    **FAMILIES["llama"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "head_dim": 16,
}  # fmt: skip
ALL_LAYERS = {"full": "", **{f"full+{what}": what for what in KEPT_OF_RECOMPUTED}}
WORKLOAD = TrainWorkload(4, 48, optimizer="sgdm", update="backward")
"""Where activations are most of the peak."""


def test_exact_against_every_subset() -> None:
    """Least work under each cap, and the lowest peak at that work."""
    model = describe_model(CONFIG)
    costs = {
        r: training_cost(model, TrainWorkload(4, 48, optimizer="sgdm", recompute=r)) for r in ("none", *ALL_LAYERS)
    }
    kept = costs["none"]
    ways = {what: costs[name].trace for name, what in ALL_LAYERS.items()}
    stays = sum(kept.staying.values())
    peaks: dict[tuple[str | None, ...], int] = {}
    for choice in itertools.product((None, *ways), repeat=5):
        again = {i: ways[what] for i, what in enumerate(choice) if what is not None}
        peaks[choice] = stays + int(moment_bytes(kept.trace, again).max())
    for name, what in {"none": None, **ALL_LAYERS}.items():
        ledger = costs[name].ledger()
        assert peaks[(what,) * 5] == max(ledger.total_bytes(p) for p in ("forward", "loss", "backward"))
    work = {
        "": (1.0, 2.0, 1.5, 1.0, 1.0),
        "attention": (0.9, 1.8, 1.5, 0.9, 0.9),
        "products": (0.1, 0.2, 0.1, 0.1, 0.1),
    }

    def total(choice: tuple[str | None, ...]) -> float:
        return sum(work[what][i] for i, what in enumerate(choice) if what is not None)

    others = max(
        kept.ledger().total_bytes(p) for p in kept.ledger().timeline if p not in ("forward", "loss", "backward")
    )
    for cap in sorted({peak for peak in peaks.values() if peak >= others})[::40]:
        fitting = {choice: peak for choice, peak in peaks.items() if peak <= cap}
        least = min(map(total, fitting))
        found = solve_layers(kept, ways, work, cap)
        assert found is not None
        chosen = tuple(found.get(i) for i in range(5))
        assert total(chosen) == pytest.approx(least)
        assert peaks[chosen] == min(p for choice, p in fitting.items() if total(choice) == pytest.approx(least))
    assert solve_layers(kept, ways, work, min(peaks.values()) - 1) is None


@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("gemma2", "eager"), ("qwen3_moe", "sdpa")])
@pytest.mark.parametrize("kept", KEPT_OF_RECOMPUTED)
def test_layers_that_keep_operators_hold_what_was_traced(family: str, attention: str, kept: str) -> None:
    config = {**FAMILIES[family], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
    workload = replace(WORKLOAD, precision="fp32", attention=attention, recompute=f"full+{kept}")
    cost = training_cost(describe_model(config), workload)
    measured = measure_tensors(config, workload)["tensor_peaks"]["step 1"]
    assert measured == pytest.approx(cost.tensor_peak_bytes, rel=0.01, abs=32 << 10)


def test_the_choice_keeps_its_peak_in_the_real_step() -> None:
    model = describe_model(CONFIG)
    kept = training_cost(model, WORKLOAD).tensor_peak_bytes
    found = choose_recomputation(model, WORKLOAD, int(0.8 * kept))
    assert found is not None
    workload, cost = found
    assert workload.recompute not in ("none", "full")
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
    assert found is not None and found[0].recompute not in ("none", "full")


def test_the_same_result_to_the_bit() -> None:
    described = describe_model(FAMILIES["gemma2"])
    ids = torch.randint(3, 72, (2, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for recompute in ("none", "1", "full", "full+attention", "0,1+products"):
        workload = TrainWorkload(2, 16, recompute=recompute, optimizer="sgdm")
        step = TrainingStep(open_model(described, torch.bfloat16, "eager"), described, workload).begin(described)
        losses.append([step.run([{"ids": ids}]) for _ in range(3)])
    assert all(other == losses[0] for other in losses)


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
        for kept in ("", "products"):
            asked = dict.fromkeys(layers, kept)
            assert recomputation(name_recomputation(asked, 8), 8) == asked
    assert name_recomputation({0: "", 1: "", 2: "products", 5: "products"}, 8) == "0-1,2+products,5+products"
    assert name_recomputation(dict.fromkeys(range(8), "attention"), 8) == "full+attention"
    for wrong in ("", "3-1", "a", "1,,2", "-1", "full,1", "1+", "none+products", "1+everything"):
        with pytest.raises(UsageError, match="layers as in 0-3,7"):
            recomputation(wrong)
    with pytest.raises(UsageError, match="but the model has 4 layers"):
        recomputation("2-4", 4)
    assert sum(layer_work(describe_model(CONFIG))) == pytest.approx(1)
