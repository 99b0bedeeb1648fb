"""Predicted activations of one forward pass, against what torch's allocator reports for the real model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine.tiny import save_tiny

import haversack  # noqa: F401
from haversack.describe.model import describe_model
from haversack.engine.profile import profile_forward
from haversack.engine.trace import LiveBytes


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def allocated_peak(model, ids: torch.Tensor) -> int:
    """The most bytes live during one forward pass, from the allocator's events."""
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.zeros_like(ids)}
        model(**given, use_cache=False, logits_to_keep=1)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(**given, use_cache=False, logits_to_keep=1)
    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "gpt2", "olmo2"])
@pytest.mark.parametrize("new_tokens", [1, 48])
def test_traced_activations_are_what_the_allocator_reports(family: str, new_tokens: int, tmp_path: Path) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    described = describe_model(save_tiny(family, tmp_path))
    predicted = profile_forward(described, batch_size=2, new_tokens=new_tokens)

    def empty_attention(module, query, key, value, *args, **kwargs):
        batch_size, num_heads, num_tokens, _ = query.shape
        return query.new_zeros(batch_size, num_tokens, num_heads, value.shape[-1]), None

    AttentionInterface.register("empty_for_test", empty_attention)
    AttentionMaskInterface.register("empty_for_test", lambda *args, **kwargs: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="empty_for_test").eval()
    measured = allocated_peak(model, torch.ones(2, new_tokens, dtype=torch.int64))
    assert measured == pytest.approx(predicted.peak_bytes, rel=0.01, abs=1024)


def test_a_traced_layer_stands_for_all_of_its_kind(tmp_path: Path) -> None:
    deep, shallow = (describe_model(save_tiny("llama", tmp_path / str(n), num_layers=n)) for n in (6, 2))
    first, second = (profile_forward(model, batch_size=1, new_tokens=8) for model in (deep, shallow))
    assert first.peak_bytes == second.peak_bytes
    assert len(first.at_attention) == 6 and len(set(first.at_attention.values())) == 1


def test_workspaces_inside_operators_count() -> None:
    with LiveBytes({torch.ops.aten.relu.default: lambda x: 10_000}) as live:
        x = torch.empty(100, device="meta")
        x.relu()
    assert live.peak_bytes == 100 * 4 * 2 + 10_000
    assert live.live_bytes == 400
    del x
    assert live.live_bytes == 0
