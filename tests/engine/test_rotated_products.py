"""Products of rotated integers: nearer than without rotation where there are outliers, kept in bytes, and a loss like the 16-bit run's."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.engine.chain import CONFIG, LENGTH, ROWS, Chain, held_back, pretrained, trained

from haversack.cost.training import training_cost
from haversack.describe.model import describe_model
from haversack.describe.workload import TrainWorkload, TuneWorkload
from haversack.engine.rotated_products import Rotated, RotatedProduct, RotatedProducts, integer_product
from haversack.engine.training_step import TrainingStep
from haversack.errors import UsageError
from haversack.jobs.training_run import measure_tensors, open_model

WORKLOAD = TuneWorkload(ROWS, LENGTH, method="full", precision="rotated8")


def products(rotate: bool | None) -> list[torch.Tensor]:
    """Output, gradients of inputs and of weights, where few channels and few tokens are large; None: in floats."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(*shape, generator=generator) for shape in ((2, 48, 96), (80, 96), (2, 48, 80)))
    x[..., 5] *= 60
    x[:, 7] *= 20
    grad[..., 3] *= 60
    x.requires_grad_(), weight.requires_grad_()
    y = x @ weight.T if rotate is None else RotatedProduct.apply(x, weight, rotate)
    y.backward(grad)
    assert x.grad is not None and weight.grad is not None
    return [y.detach(), x.grad, weight.grad]


def test_errors_are_below_those_without_rotation() -> None:
    exact = products(None)
    errors = {
        rotate: [float((a - b).norm() / b.norm()) for a, b in zip(products(rotate), exact, strict=True)]
        for rotate in (True, False)
    }
    assert all(error < 0.03 for error in errors[True]), errors
    assert all(ours < 0.7 * plain for ours, plain in zip(errors[True], errors[False], strict=True)), errors


def test_integers_are_multiplied_exactly_and_rotations_cancel() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (n, 200), dtype=torch.int8, generator=generator) for n in (5, 7))
    assert torch.equal(integer_product(a, b), (a.long() @ b.long().T).float())
    rows = torch.randn(5, 96, generator=generator)
    scaled = Rotated(rows).times(Rotated(torch.eye(96)))
    assert torch.allclose(scaled, rows, atol=0.03 * float(rows.abs().max()))


def test_a_byte_of_each_input_is_kept() -> None:
    linear_input = torch.randn(2, 5, 64, requires_grad=True)
    weight = torch.randn(32, 64, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        RotatedProduct.apply(linear_input, weight, True)
    assert [(tuple(t.shape), t.dtype) for t in kept if t is not weight] == [
        ((10, 64), torch.int8),
        ((10, 1), torch.float32),
    ]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        RotatedProduct.apply(linear_input, weight.detach(), True)
    assert len(kept) == 1  # a frozen weight needs no input


def test_bytes_are_as_predicted() -> None:
    gc.collect()  # what is released under the profiler counts against it
    cost = training_cost(describe_model(CONFIG), replace(WORKLOAD, seq_len=64))
    measured = measure_tensors(CONFIG, replace(WORKLOAD, seq_len=64))
    for owner, num_bytes in measured["residents"].items():  # rotary tables stay in 32 bits
        assert num_bytes == pytest.approx(cost.staying[owner], abs=64 if owner == "weights" else 0)
    passes = max(cost.ledger().total_bytes(p) for p in ("forward", "loss", "backward"))
    assert measured["tensor_peaks"]["step 1"] == pytest.approx(passes, rel=0.02, abs=64 << 10)


def test_a_tuned_loss_tracks_the_16_bit_run() -> None:
    chain = Chain(1, kept=0.5)
    weights = {name: tensor.bfloat16() for name, tensor in pretrained().items()}
    runs: dict[str, Any] = {
        precision: trained(replace(WORKLOAD, precision=precision), chain, steps=20, lr=3e-3, weights=weights)
        for precision in ("rotated8", "master")
    }
    ours, theirs = (torch.tensor(runs[name][1]) for name in ("rotated8", "master"))
    assert theirs[0] - theirs[-1] > 0.2
    assert float((ours - theirs).abs().max()) < 0.1
    assert abs(held_back(runs["rotated8"][0], chain) - held_back(runs["master"][0], chain)) < 0.03


def test_hardware_without_such_products_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    described = describe_model(CONFIG)
    for has, notes in ((True, 0), (False, 1)):
        monkeypatch.setattr("haversack.engine.rotated_products.multiplies_integers", lambda device, has=has: has)
        step = TrainingStep(open_model(described, torch.bfloat16, "sdpa"), described, WORKLOAD)
        assert len(step.notes) == notes and all("emulated" in note for note in step.notes)


def test_the_model_is_given_back_and_bad_settings_are_refused() -> None:
    model = open_model(describe_model(CONFIG), torch.float32, "sdpa")
    with RotatedProducts(model) as products_of:
        assert len(products_of._rerouted) == 7 * 4
    assert not any("forward" in module.__dict__ for module in model.modules())
    with pytest.raises(UsageError, match="layers have none"):
        described = describe_model(CONFIG)
        workload = TuneWorkload(1, 8, method="qlora", precision="rotated8")
        TrainingStep(open_model(described, torch.bfloat16, "sdpa"), described, workload)
    with pytest.raises(UsageError, match="precision is 'rotated4'"):
        TrainWorkload(1, 8, precision="rotated4")
