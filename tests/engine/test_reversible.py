"""Reversible layers: inputs are found again, gradients are those of the coupled model, and what is kept does not grow with depth."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.describe.families import FAMILIES
from tests.engine.chain import CONFIG, LENGTH, ROWS, Chain, held_back, pretrained, trained
from torch.utils.checkpoint import checkpoint

from haversack.cost.training import training_cost
from haversack.describe.model import describe_model
from haversack.describe.workload import TuneWorkload
from haversack.engine.reversible import ReversibleLayers, momentum_of
from haversack.engine.training_trace import compose, trace_training
from haversack.errors import UnsupportedModelError, UsageError
from haversack.jobs.training_run import measure_tensors, open_model

WORKLOAD = TuneWorkload(ROWS, LENGTH, method="lora", lora_rank=8, precision="fp32", saved="reversible")
DEEP: dict[str, Any] = {**CONFIG, "num_hidden_layers": 16}


def model_of(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    return open_model(describe_model(config), dtype, "sdpa").train()


def checkpointed_loss(model: Any, ids: torch.Tensor, m: float) -> torch.Tensor:
    """The coupled model by recomputation: its equations, each layer's input kept."""
    base = model.model
    x = base.embed_tokens(ids)
    places = torch.arange(ids.shape[1])[None]
    rotary = base.rotary_emb(x, places)
    x, v = x.double(), torch.zeros_like(x, dtype=torch.float64)
    for layer in base.layers:
        seen = x.to(model.dtype)
        out = checkpoint(
            lambda h, layer=layer: layer(h, attention_mask=None, position_ids=places, position_embeddings=rotary),
            seen,
            use_reentrant=False,
        )
        v = m * v + (1 - m) * (out.double() - seen.double())
        x = x + v
    logits = model.lm_head(base.norm((x + m / (1 - m) * v).to(model.dtype)))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_a_checkpointed_run(frozen: bool) -> None:
    model = model_of(DEEP)
    if frozen:  # as beside adapters: no gradient reaches the embedding
        model.model.embed_tokens.requires_grad_(False)
    ids = Chain().rows(0)
    expected = checkpointed_loss(model, ids, momentum_of(16))
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with ReversibleLayers(model):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_found_again(dtype: torch.dtype) -> None:
    """After sixteen layers: a few thousandths of the largest at most; in 16 bits nearly all to the bit."""
    model = model_of(DEEP, dtype)
    inputs: list[list[torch.Tensor]] = [[] for _ in range(16)]
    for position, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_pre_hook(
            lambda m, args, at=position: inputs[at].append(args[0].detach())
        )
    with ReversibleLayers(model):
        model(input_ids=Chain().rows(0), labels=Chain().rows(0), use_cache=False).loss.backward()
    for forth, back in inputs:
        assert dtype == torch.float32 or float((forth == back).float().mean()) > 0.99
        assert float((forth - back).abs().max()) <= (2e-3 if dtype == torch.float32 else 1e-2) * float(
            forth.abs().max()
        )


def test_what_is_kept_does_not_grow_with_depth() -> None:
    peaks, kept = {}, {}
    for saved in ("reversible", "exact"):
        for layers in (8, 16):
            trace = trace_training(
                describe_model({**CONFIG, "num_hidden_layers": layers}), replace(WORKLOAD, saved=saved)
            )
            kept[saved, layers] = sum(trace.kept_bytes(layer) for layer in range(layers))
            peaks[saved, layers] = max(m.owners.get("activations", 0) for m in compose(trace))
    number = ROWS * LENGTH * 64
    assert kept["reversible", 16] == kept["reversible", 8] <= 2 * 8 * number + 4 * 4 * number
    assert peaks["reversible", 16] == peaks["reversible", 8]
    assert peaks["exact", 16] > 1.8 * peaks["exact", 8] > 5 * peaks["reversible", 16]


def test_bytes_are_as_predicted() -> None:
    gc.collect()  # what is released under the profiler counts against it
    workload = replace(WORKLOAD, seq_len=64)
    cost = training_cost(describe_model(DEEP), workload)
    measured = measure_tensors(DEEP, workload)["tensor_peaks"]
    passes = max(cost.ledger().total_bytes(p) for p in ("forward", "loss", "backward"))
    assert measured["step 1"] == pytest.approx(passes, rel=0.01, abs=64 << 10)


def test_outputs_begin_near_the_models_own_and_evaluation_is_the_models() -> None:
    """Nearer than a layer's absence is: KL in nats per token of a trained model; and the model is given back."""
    model = model_of(CONFIG)
    model.load_state_dict(pretrained())
    ids = Chain().rows(0)
    own = model(input_ids=ids, use_cache=False).logits.detach().log_softmax(-1)

    def divergence(logits: torch.Tensor) -> float:
        other = logits.detach().log_softmax(-1)
        return float((own.exp() * (own - other)).sum(-1).mean())

    found = {}
    for momentum in (0.5, 0.25, 1 / 8):
        with ReversibleLayers(model, momentum):
            found[momentum] = divergence(model(input_ids=ids, use_cache=False).logits)
            with torch.no_grad():
                assert divergence(model(input_ids=ids, use_cache=False).logits) == 0
    assert not any("forward" in module.__dict__ for module in model.modules())
    layer = model.model.layers.pop(1)
    without = divergence(model(input_ids=ids, use_cache=False).logits)
    model.model.layers.insert(1, layer)
    assert found[1 / 8] < found[0.25] < found[0.5] and found[1 / 8] < 0.1 * without, (found, without)


def test_tuned_as_well_as_with_activations_kept() -> None:
    chain = Chain(1, kept=0.5)
    before = held_back(trained(WORKLOAD, chain, steps=0, lr=0.0, weights=pretrained())[0], chain)
    found = {
        saved: held_back(
            trained(replace(WORKLOAD, saved=saved), chain, steps=30, lr=1e-2, weights=pretrained())[0], chain
        )
        for saved in ("reversible", "exact")
    }
    assert before - found["reversible"] > 0.9 * (before - found["exact"]), (before, found)


def test_what_cannot_be_run_backwards_is_refused() -> None:
    dropping = open_model(describe_model(FAMILIES["gpt2"]), torch.float32, "sdpa")
    with pytest.raises(UsageError, match="can't drop activations"):
        ReversibleLayers(dropping)
    with pytest.raises(UsageError, match="momentum is 1"):
        ReversibleLayers(model_of(CONFIG), 1)
    with pytest.raises(UsageError, match=r"with lora_dropout 0\.1"):
        TuneWorkload(1, 8, saved="reversible", lora_dropout=0.1)
    model = model_of(CONFIG)
    model.model.layers[1].register_forward_hook(lambda module, args, output: output + 1)
    with ReversibleLayers(model), pytest.raises(UnsupportedModelError, match="between its layers"):
        model(input_ids=Chain().rows(0), use_cache=False)
    assert momentum_of(4) == 1 / 8 and momentum_of(32) == 0.5
