"""Resting layers: no inputs kept and no gradients, all get their turn, and a run fits its prediction, resumes, and learns."""

from __future__ import annotations

import gc
from dataclasses import replace
from math import inf

import pytest
import torch
from tests.engine.chain import CONFIG, LENGTH, ROWS, Chain, held_back, pretrained, trained

from haversack.cost.training import training_cost
from haversack.describe.model import describe_model
from haversack.describe.workload import TrainWorkload, TuneWorkload
from haversack.engine.resting_layers import RestingLayers
from haversack.engine.saved_activations import PackedActivation
from haversack.engine.training_state import restore, state_of
from haversack.errors import UsageError
from haversack.jobs.training_run import measure_tensors, open_model

WORKLOAD = TuneWorkload(ROWS, LENGTH, method="full", precision="fp32", saved="resting")


def test_resting_layers_keep_no_inputs_and_the_rest_is_in_8_bits() -> None:
    model = open_model(describe_model(CONFIG), torch.float32, "sdpa").train()
    resting = RestingLayers(model)
    resting.rest()
    assert resting.resting == (0, 1)
    inputs: dict[int, list[torch.Tensor]] = {}
    for position, layer in enumerate(model.model.layers):
        for module in (layer.self_attn.q_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            module.register_forward_pre_hook(lambda m, args, at=position: inputs.setdefault(at, []).append(args[0]))
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=Chain().rows(0), labels=Chain().rows(0), use_cache=False).loss
    for position, tensors in inputs.items():
        own = [tensor.untyped_storage().data_ptr() in kept for tensor in tensors]
        assert own == [position not in (0, 1)] * 3, position
    loss.backward()
    for position, layer in enumerate(model.model.layers):
        assert all((p.grad is None) == (position in (0, 1)) for p in layer.parameters())
    resting.wake()
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_kept_between_the_linears_is_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []
    monkeypatch.setattr(
        PackedActivation, "unpack", lambda self, of=PackedActivation.unpack: (seen.append(self.shape), of(self))[1]
    )
    trained(WORKLOAD, Chain(), steps=1, lr=1e-3)
    assert len(seen) >= 4 * len("qkv")


def test_bytes_are_as_predicted() -> None:
    """Of a second step, but for states of the layers that then run first, which come with its update."""
    gc.collect()  # what is released under the profiler counts against it
    config = {**CONFIG, "num_hidden_layers": 6}
    workload = replace(WORKLOAD, batch_size=4, seq_len=64)
    cost = training_cost(describe_model(config), workload)
    exact = training_cost(describe_model(config), replace(workload, saved="exact"))
    layer = sum(
        p.numel() for p in open_model(describe_model(config), torch.float32, "sdpa").model.layers[0].parameters()
    )
    assert exact.trace.gradient_bytes - cost.trace.gradient_bytes == 3 * 4 * layer
    measured = measure_tensors(config, workload)
    passes = max(cost.ledger().total_bytes(p) for p in ("forward", "loss", "backward"))
    states_to_come = cost.state_bytes - measured["residents"]["optimizer states"]
    assert states_to_come == 0
    late = 2 * 4 * 3 * layer  # of the second step, those of the layers that run for the first time are made at its end
    assert measured["tensor_peaks"]["step 1"] + late == pytest.approx(passes, rel=0.02, abs=64 << 10)
    assert measured["tensor_peaks"]["update 1"] == pytest.approx(
        cost.ledger().total_bytes("update"), rel=0.02, abs=64 << 10
    )
    assert passes < 0.75 * exact.tensor_peak_bytes


def test_all_take_turns_by_how_far_they_moved() -> None:
    model = open_model(describe_model(CONFIG), torch.float32, "sdpa")
    resting = RestingLayers(model)
    resting.rest()
    for amount, expected in (((0, 0, 0.1, 0.2), (2, 3)), ((0.3, 0.05, 0, 0), (1, 2)), ((0.01, 0, 0, 0.5), (0, 1))):
        awake = [layer for layer in range(4) if layer not in resting.resting]
        with resting.watched(), torch.no_grad():
            for layer in awake:
                for parameter in resting.parameters([layer]):
                    parameter.mul_(1 + amount[layer])
        assert all(resting.distances[layer] == pytest.approx(amount[layer], rel=1e-3) for layer in awake)
        assert resting.resting == expected
        assert not any(p.requires_grad for p in resting.parameters(expected))


def test_a_resumed_run_is_the_unbroken_one() -> None:
    from tests.engine.test_rounded_weights import Held

    step, _ = trained(WORKLOAD, Chain(), steps=3, lr=1e-3)
    held = Held(state_of(step))
    assert step.resting is not None and inf not in step.resting.distances
    other, _ = trained(WORKLOAD, Chain(), steps=0, lr=1e-3)
    restore(other, held)
    assert other.resting is not None and other.resting.resting == step.resting.resting
    for number in range(3):
        batch = [{"ids": Chain().rows(50 + number)}]
        assert step.run(batch) == other.run(batch)
    assert all(torch.equal(a, b) for a, b in zip(step.model.parameters(), other.model.parameters(), strict=True))


def test_tuned_nearly_as_well_as_all_layers_at_once() -> None:
    chain = Chain(1, kept=0.5)
    before = held_back(trained(WORKLOAD, chain, steps=0, lr=0.0, weights=pretrained())[0], chain)
    found = {
        saved: held_back(
            trained(replace(WORKLOAD, saved=saved), chain, steps=30, lr=3e-3, weights=pretrained())[0], chain
        )
        for saved in ("resting", "exact")
    }
    assert before - found["resting"] > 0.85 * (before - found["exact"]), (before, found)


def test_bad_settings_are_refused() -> None:
    model = open_model(describe_model({**CONFIG, "num_hidden_layers": 1}), torch.float32, "sdpa")
    with pytest.raises(UsageError, match=r"no whole layer is 0\.5 of 1"):
        RestingLayers(model)
    with pytest.raises(UsageError, match="share of layers is 0"):
        RestingLayers(model, 0)
    with pytest.raises(UsageError, match="saved is 'resting' with method lora"):
        TuneWorkload(1, 8, saved="resting")
    with pytest.raises(UsageError, match="update is 'backward' with saved 'resting'"):
        TrainWorkload(1, 8, saved="resting", update="backward")
