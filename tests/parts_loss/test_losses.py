"""The contract of losses: equal to torch's whole logits, value and gradients, within the declared workspace."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haversack.errors import UsageError
from haversack.jobs.measured_run import memory_events
from haversack.parts.base import all_parts, part_from_dict
from haversack.parts.loss.base import HeadOutput, Loss, mean_loss
from haversack.parts.loss.cut import CutCrossEntropy
from haversack.parts.loss.whole import WholeLogits

LOSSES: tuple[Loss, ...] = (
    CutCrossEntropy(),
    CutCrossEntropy(block_elements=16),
    CutCrossEntropy(block_elements=2**10),
    WholeLogits(),
)


def case(
    tokens: int = 11, vocabulary: int = 37, hidden: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_()
    return states, weight, bias, torch.randint(0, vocabulary, (tokens,), generator=generator)


def gradients(
    loss: Loss, inputs: tuple[torch.Tensor, ...], labels: torch.Tensor, shares: torch.Tensor, output: HeadOutput
) -> list[torch.Tensor]:
    """Each token's loss, and gradients of their sum by shares."""
    states, weight, bias = inputs
    losses = loss.token_losses(states, weight, labels, bias, output)
    return [losses.detach(), *torch.autograd.grad((losses * shares).sum(), [states, weight, bias])]


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    vocabulary=st.integers(2, 90),
    block_elements=st.integers(16, 600),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([1.0, 0.4]),
    ignored=st.floats(0, 0.9),
    seed=st.integers(0, 1000),
)
def test_equal_to_whole_logits(
    tokens: int, vocabulary: int, block_elements: int, softcap: float | None, scale: float, ignored: float, seed: int
) -> None:
    """Any shape and block, softcap, scale, label mask and weights of tokens; float32's rounding over sums of 90."""
    *inputs, labels = case(tokens, vocabulary, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    shares = torch.rand(tokens, generator=generator)
    output = HeadOutput(scale, softcap)
    ours, theirs = (
        gradients(loss, tuple(inputs), labels, shares, output)
        for loss in (CutCrossEntropy(block_elements=block_elements), WholeLogits())
    )
    for mine, whole in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, whole, atol=3e-5 * max(1.0, float(whole.abs().max())))


@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_are_as_near_as_whole_logits(autocast: bool) -> None:
    """Measured against float64 of the same numbers: no further off than torch's own, by half at most."""
    dtype = torch.float32 if autocast else torch.bfloat16
    *inputs, labels = case(64, 300, 32, dtype=dtype)
    if autocast:
        inputs = [x.detach().bfloat16().float().requires_grad_() for x in inputs]
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    shares = torch.full((64,), 1 / 64)
    truth = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T + exact[2], labels)
    truths = [truth.detach(), *torch.autograd.grad(truth, exact)]
    errors = []
    for loss in (CutCrossEntropy(block_elements=2**10), WholeLogits()):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = gradients(loss, tuple(inputs), labels, shares, HeadOutput())
        found[0] = found[0].mean()
        errors.append([float((f - t).norm() / t.norm()) for f, t in zip(found, truths, strict=True)])
    assert all(ours <= 1.5 * theirs + 1e-4 for ours, theirs in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES[:1] + LOSSES[3:], ids=lambda loss: loss.id)
def test_holds_no_more_than_it_declares(loss: Loss, dtype: torch.dtype) -> None:
    """The most allocated during both passes, gradients aside, by torch's profiler; and at most 2.5 times too much is declared."""
    tokens, vocabulary, hidden = 96, 40_000, 16
    states, weight, _, labels = case(tokens, vocabulary, hidden, dtype=dtype)
    name = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]

    def run() -> None:
        mean_loss(loss.token_losses(states, weight, labels), labels).backward()
        states.grad = weight.grad = None

    run()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    live = peak = 0
    for _, num_bytes in sorted(memory_events(profile)):
        live += num_bytes
        peak = max(peak, live)
    peak -= weight.nbytes + states.nbytes
    declared = loss.workspace_bytes(tokens, vocabulary, hidden, name)
    assert peak <= declared + 64 * 1024 and declared <= 2.5 * peak, (peak, declared)


def test_a_hundredth_of_the_logits() -> None:
    """At 4,096 tokens, 256,000 entries and width 256, with the gradient of the hidden states: declared, and tested to be kept."""
    cut = CutCrossEntropy().workspace_bytes(4096, 256_000, 256, "F32") + 4 * 4096 * 256
    assert cut <= 0.01 * 4 * 4096 * 256_000


def test_frozen_heads_cost_no_gradient() -> None:
    states, weight, bias, labels = case()
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    CutCrossEntropy(block_elements=64).token_losses(states, weight, labels, bias).sum().backward()
    assert weight.grad is None and bias.grad is None and states.grad is not None


def test_labels_outside_the_vocabulary_are_refused() -> None:
    states, weight, _, labels = case()
    labels[3] = 37
    with pytest.raises(UsageError, match=r"labels lie from .* to 37, but the vocabulary has 37 entries"):
        CutCrossEntropy().token_losses(states, weight, labels)


def test_nothing_counted_is_no_number_and_no_error() -> None:
    states, weight, _, labels = case()
    labels[:] = -100
    losses = CutCrossEntropy().token_losses(states, weight, labels)
    assert not losses.any() and mean_loss(losses, labels).isnan()


def test_registered_losses_are_tried_and_round_trip() -> None:
    registered = {id for id, part in all_parts().items() if issubclass(part, Loss)}
    assert {loss.id for loss in LOSSES} == registered
    for loss in LOSSES:
        data: dict[str, Any] = json.loads(json.dumps(loss.to_dict()))
        assert part_from_dict(data) == loss
    with pytest.raises(UsageError, match="block_elements is 1"):
        CutCrossEntropy(1)
