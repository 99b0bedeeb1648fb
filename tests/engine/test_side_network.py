"""A side network: nothing of the model is in the graph, it learns, it is planned, and it comes back from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.describe.families import FAMILIES
from tests.engine.chain import LENGTH, ROWS, Chain, held_back, pretrained, trained

from haversack.cost.training import training_cost
from haversack.describe.model import describe_model
from haversack.describe.workload import TuneWorkload
from haversack.engine.side_network import load_side_network, save_side_network, side_parameters
from haversack.engine.training_step import TrainingStep
from haversack.errors import CheckpointError, UsageError
from haversack.jobs.training_run import measure_tensors, open_model

CONFIG: dict[str, Any] = {
    **FAMILIES["llama"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "head_dim": 16,
    "num_hidden_layers": 4,
}
WORKLOAD = TuneWorkload(2, 24, method="side", precision="fp32")


def test_nothing_of_the_model_is_kept_and_it_learns(tmp_path: Path) -> None:
    described = describe_model(CONFIG)
    model = open_model(described, torch.float32, "sdpa").eval()
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
    step = TrainingStep(model, described, WORKLOAD).begin(described)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    model.model.layers[0].register_forward_hook(lambda layer, args, output: seen.append(output))
    seen: list[torch.Tensor] = []
    for group in step.optimizer.optimizers[0].param_groups:
        group["lr"] = 3e-2
    losses = [step.run([{"ids": ids}]) for _ in range(20)]
    assert not any(hidden.requires_grad for hidden in seen) and losses[-1] < losses[0] - 0.02
    assert set(step.trained) == set(side_parameters(model).values())
    with torch.no_grad():
        tuned = model(input_ids=ids, use_cache=False).logits
        generated = model.generate(ids[:1, :6], max_new_tokens=4, do_sample=False)
    save_side_network(model, tmp_path, "base")
    other = open_model(described, torch.float32, "sdpa").eval()
    load_side_network(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids, use_cache=False).logits, tuned)
        assert torch.equal(other.generate(ids[:1, :6], max_new_tokens=4, do_sample=False), generated)  # with a cache
    narrow = open_model(describe_model(FAMILIES["llama"]), torch.float32, "sdpa")
    with pytest.raises(CheckpointError, match="of another shape"):
        load_side_network(narrow, tmp_path)


def test_a_plan_knows_its_bytes() -> None:
    described = describe_model(CONFIG)
    cost = training_cost(described, WORKLOAD)
    lora = training_cost(described, TuneWorkload(2, 24, method="lora", lora_rank=4, precision="fp32"))
    assert cost.tensor_peak_bytes < lora.tensor_peak_bytes
    measured = measure_tensors(CONFIG, WORKLOAD)
    assert measured["residents"]["adapters"] == cost.staying["adapters"]
    assert measured["residents"]["optimizer states"] == cost.state_bytes
    assert measured["tensor_peaks"]["step 1"] == pytest.approx(cost.tensor_peak_bytes, rel=0.01, abs=32 << 10)
    with pytest.raises(UsageError, match="method is 'side' with recompute full"):
        TuneWorkload(1, 8, method="side", recompute="full")


def test_the_graph_holds_nothing_of_the_model_and_the_loss_is_near_adapters() -> None:
    """What side layers keep is theirs: no tensor that any module of the model made or was given."""
    chain = Chain(1, kept=0.5)
    workload = TuneWorkload(ROWS, LENGTH, method="side", precision="fp32")
    step, _ = trained(workload, chain, steps=0, lr=0.0, weights=pretrained())
    before = held_back(step, chain)
    own: set[int] = set()
    alive: list[torch.Tensor] = []  # so that no storage is used twice

    def note(module: torch.nn.Module, args: Any, output: Any) -> None:
        for tensor in (*args, *(output if isinstance(output, tuple) else (output,))):
            if isinstance(tensor, torch.Tensor):
                alive.append(tensor)
                own.add(tensor.untyped_storage().data_ptr())

    for layer in step.model.model.layers:
        for name, module in layer.named_modules():
            if "side" not in name:
                module.register_forward_hook(note)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        step.loss(chain.rows(0))
    inner = [t for t in kept if t.untyped_storage().data_ptr() in own]
    assert kept and not inner
    found = {}
    for method in (
        "side",
        "lora",
    ):  # of rank 1, which trains more weights than the side network has; each at the better rate
        tuned = TuneWorkload(ROWS, LENGTH, method=method, lora_rank=1, precision="fp32")
        runs = [trained(tuned, chain, steps=30, lr=lr, weights=pretrained())[0] for lr in (1e-2, 3e-2)]
        found[method] = min(held_back(run, chain) for run in runs)
    assert before - found["side"] > 0.8 * (before - found["lora"]), (before, found)
