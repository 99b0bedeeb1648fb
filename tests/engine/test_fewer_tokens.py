"""Fewer tokens: what inner layers keep falls by the share of tokens, masks and positions go with them, and a tuned model is nearly as good."""

from __future__ import annotations

import gc
from dataclasses import replace
from math import ceil
from typing import Any

import pytest
import torch
from tests.describe.families import FAMILIES
from tests.engine.chain import CONFIG, LENGTH, ROWS, Chain, held_back, pretrained, trained

from haversack.cost.training import training_cost
from haversack.describe.model import describe_model
from haversack.describe.workload import TuneWorkload
from haversack.engine.fewer_tokens import FewerTokens, turned
from haversack.engine.training_trace import trace_training
from haversack.errors import UnsupportedModelError, UsageError
from haversack.jobs.training_run import measure_tensors, open_model

WORKLOAD = TuneWorkload(ROWS, LENGTH, method="lora", lora_rank=8, precision="fp32", saved="tokens")


@pytest.mark.parametrize("length", [32, 45])
def test_inner_layers_keep_the_share_of_tokens(length: int) -> None:
    described = describe_model({**CONFIG, "num_hidden_layers": 6})
    fewer, dense = (
        trace_training(described, replace(WORKLOAD, seq_len=length, saved=saved)) for saved in ("tokens", "exact")
    )
    share = ceil(0.75 * length) / length
    ran = ROWS * ceil(0.75 * length)
    beside = (
        8 * ran + 2 * 4 * 16 * ran
    )  # which tokens ran, and their rotations, which all layers share when they run all
    for layer in range(1, 5):
        assert fewer.kept_bytes(layer) == pytest.approx(share * dense.kept_bytes(layer) + beside, rel=0.02)
    assert fewer.kept_bytes(0) == dense.kept_bytes(0) + 4 * ROWS * length  # and how far each token was turned


def test_bytes_are_as_predicted() -> None:
    gc.collect()  # what is released under the profiler counts against it
    config = {**CONFIG, "num_hidden_layers": 6}
    workload = replace(WORKLOAD, seq_len=64)
    cost = training_cost(describe_model(config), workload)
    measured = measure_tensors(config, workload)["tensor_peaks"]
    passes = max(cost.ledger().total_bytes(p) for p in ("forward", "loss", "backward"))
    assert measured["step 1"] == pytest.approx(passes, rel=0.01, abs=64 << 10)
    assert measured["evaluate"] < 1.01 * cost.ledger().total_bytes("evaluate") + (64 << 10)
    assert passes < 0.92 * training_cost(describe_model(config), replace(workload, saved="exact")).tensor_peak_bytes


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3"])
@pytest.mark.parametrize("apart", [False, True])
def test_all_tokens_in_order_are_the_model_itself(family: str, apart: bool) -> None:
    """With a share that rounds up to every token, to the bit, through cut masks and positions; and the model is given back."""
    config = dict(FAMILIES[family]) | ({"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4})
    model = open_model(describe_model(config), torch.float32, "eager" if family == "gemma2" else "sdpa")
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    place = torch.arange(12)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if apart:
        inputs["position_ids"] = torch.where(place < 7, place, place - 7).repeat(2, 1)
    expected = model(**inputs).logits
    with FewerTokens(model, share=0.99):
        assert torch.equal(model(**inputs).logits, expected)
    with FewerTokens(model, share=0.5):
        assert not torch.equal(model(**inputs).logits, expected)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected)  # evaluation runs every token
        model.eval()
        assert torch.equal(model(**inputs).logits, expected)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_token_that_no_layer_runs_passes_as_it_is() -> None:
    model = open_model(describe_model(CONFIG), torch.float32, "sdpa").train()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    layer = model.model.layers[2]
    with FewerTokens(model, share=0.25):
        layer.register_forward_hook(
            lambda module, args, kwargs, out: seen.append((args[0] if args else kwargs["hidden_states"], out)),
            with_kwargs=True,
        )
        model(input_ids=Chain().rows(0), use_cache=False)
    before, after = (t.detach() for t in seen[0])
    ran = (before != after).any(-1)
    assert (ran.sum(1) == LENGTH // 4).all() and ran[:, 0].all()
    assert (turned(before, after)[~ran] < 1e-6).all()


def test_tuned_nearly_as_well_as_with_all_tokens() -> None:
    """To another chain, of which half is as before; on rows held back, with every token running."""
    chain = Chain(1, kept=0.5)
    before = held_back(trained(WORKLOAD, chain, steps=0, lr=0.0, weights=pretrained())[0], chain)
    found = {
        saved: held_back(
            trained(replace(WORKLOAD, saved=saved), chain, steps=30, lr=1e-2, weights=pretrained())[0], chain
        )
        for saved in ("tokens", "exact")
    }
    assert before - found["tokens"] > 0.95 * (before - found["exact"]), (before, found)


def test_bad_settings_are_refused() -> None:
    model = open_model(describe_model(CONFIG), torch.float32, "sdpa").train()
    with pytest.raises(UsageError, match="share of tokens is 1"):
        FewerTokens(model, 1)
    small = open_model(describe_model({**CONFIG, "num_hidden_layers": 2}), torch.float32, "sdpa")
    with pytest.raises(UsageError, match="the model has 2"):
        FewerTokens(small)
    ids = Chain().rows(0)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "per_token": torch.zeros(ROWS, 3, LENGTH)}), with_kwargs=True
        )
    with FewerTokens(model), pytest.raises(UnsupportedModelError, match="given per_token"):
        model(input_ids=ids, use_cache=False)
    with pytest.raises(UsageError, match="saved is 'tokens' with recompute full"):
        TuneWorkload(1, 8, saved="tokens", recompute="full")
