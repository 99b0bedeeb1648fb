"""Activations kept in 8 bits: exact forward, near gradients, a fourth of the bytes, and the model as it was afterwards."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.describe.families import FAMILIES
from tests.engine.chain import LENGTH, ROWS, Chain, trained

from haversack.cost.training import PASSES, training_cost
from haversack.describe.machine import Disk, detect
from haversack.describe.model import describe_model
from haversack.describe.parallel import Parallelism
from haversack.describe.workload import TrainWorkload
from haversack.engine.saved_activations import GROUP, ActivationFile, SaveAsFloat8, SaveInEightBits, SaveOnDisk, pack
from haversack.engine.training_step import TrainingStep
from haversack.engine.training_trace import compose, trace_training
from haversack.errors import DoesNotFitError, OutputError, UsageError
from haversack.jobs.training_run import open_model
from haversack.plan.training import TrainingQuestion, predict_training

CONFIG: dict[str, Any] = {**FAMILIES["llama"], "hidden_size": 64, "intermediate_size": 160, "head_dim": 16}


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    width=st.sampled_from([1, 7, 64, 256, 300]),
    scale=st.floats(1e-6, 1e6),
    seed=st.integers(0, 99),
)
def test_no_number_is_off_by_more_than_half_a_step(rows: int, width: int, scale: float, seed: int) -> None:
    values = scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    error = (pack(values).unpack() - values).abs()
    groups = values.view(-1, GROUP) if width == 256 else values
    step = (groups.amax(-1) - groups.amin(-1)) / 255
    assert bool((error.view(groups.shape).amax(-1) <= 0.51 * step + 1e-6 * groups.abs().amax(-1)).all())


def gradients(family: dict[str, Any], keep: Callable[[Any], object] = lambda model: None) -> tuple[float, torch.Tensor]:
    """Loss and all gradients."""
    model = open_model(
        describe_model(family), torch.float32, "eager"
    ).train()  # attention's probabilities are kept, too
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    keep(model)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_forward_pass_is_exact_and_gradients_are_near(family: str) -> None:
    loss, exact = gradients(FAMILIES[family])
    errors = []
    for keep in (SaveInEightBits, SaveAsFloat8):
        rounded_loss, rounded = gradients(FAMILIES[family], keep)
        assert rounded_loss == loss
        errors.append(float((rounded - exact).norm() / exact.norm()))
    assert 0 < errors[0] < 0.02, errors  # 8 bits of each number: some thousandths
    assert errors[0] < errors[1] < 0.08, errors  # 3 bits of a fraction: some hundredths


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_from_a_file_everything_comes_back_as_it_was(family: str, tmp_path: Path) -> None:
    files: list[SaveOnDisk] = []
    loss, exact = gradients(FAMILIES[family])
    found_loss, found = gradients(FAMILIES[family], lambda model: files.append(SaveOnDisk(model, tmp_path)))
    assert found_loss == loss and torch.equal(found, exact)
    assert files[0].file.end_bytes > 0 and not list(tmp_path.iterdir())  # a file without a name


def test_a_plan_books_what_the_file_holds_and_refuses_a_full_disk(tmp_path: Path) -> None:
    described = describe_model({**CONFIG, "num_hidden_layers": 5})
    workload = TrainWorkload(2, 24, precision="fp32", saved="disk")
    step = TrainingStep(open_model(described, torch.float32, "sdpa"), described, workload, tmp_path).begin(described)
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    held = []
    step.model.register_forward_hook(lambda *_: held.append(step.on_disk.held_bytes))  # type: ignore[union-attr]
    step.micro_step(ids)
    ledger = training_cost(described, workload).ledger()
    assert held[0] > 0
    assert {point: ledger.total_bytes(point, "disk") for point in ledger.timeline if point in PASSES} == dict.fromkeys(
        PASSES, held[0]
    )
    assert ledger.total_bytes("update", "disk") == 0
    small = dataclasses.replace(detect(), disk=Disk(str(tmp_path), 10 * held[0], held[0] - 5))
    answer = predict_training(TrainingQuestion(described, workload, small, Parallelism(), None, "tensor"))
    assert not answer.fits and answer.shortfall_bytes == 5
    with pytest.raises(DoesNotFitError, match="on disk, which has 5 B less"):
        answer.require_fit()


def test_a_file_is_used_again_when_nothing_of_it_is_needed(tmp_path: Path) -> None:
    file = ActivationFile(tmp_path)
    one, other = file.keep(torch.arange(5.0)), file.keep(torch.ones(3, 2, dtype=torch.bfloat16))
    assert one.unpack().tolist() == [0, 1, 2, 3, 4] and other.unpack().tolist() == [[1, 1]] * 3
    assert other.start == 20
    del one, other
    assert file.keep(torch.zeros(1)).start == 0


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = ActivationFile(tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="free some space"):
        file.keep(torch.zeros(4))


def test_the_model_is_given_back() -> None:
    model = open_model(describe_model(CONFIG), torch.float32, "sdpa").train()
    with SaveInEightBits(model):
        pass
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.model.layers)


def test_a_plan_knows_the_bytes_and_what_cannot_be() -> None:
    described = describe_model({**CONFIG, "num_hidden_layers": 4})
    kept = {
        saved: max(
            m.owners.get("activations", 0)
            for m in compose(trace_training(described, TrainWorkload(4, 64, precision="fp32", saved=saved)))
        )
        for saved in ("exact", "8bit", "fp8", "disk")
    }
    assert kept["fp8"] < kept["8bit"] < 0.45 * kept["exact"] and kept["disk"] < 0.2 * kept["exact"], kept
    with pytest.raises(UsageError, match="saved is '4bit'"):
        TrainWorkload(1, 8, saved="4bit")
    with pytest.raises(UsageError, match="autocast"):
        TrainWorkload(1, 8, saved="8bit", precision="autocast")


def test_a_byte_and_two_32_bit_numbers_a_group_are_kept() -> None:
    values = torch.randn(3, 5, 256)
    kept = pack(values)
    assert kept.codes.nbytes + kept.scales.nbytes + kept.least.nbytes == values.numel() * (1 + 8 / GROUP)


def test_a_loss_curve_tracks_the_exact_one() -> None:
    curves = {
        saved: torch.tensor(
            trained(TrainWorkload(ROWS, LENGTH, precision="fp32", saved=saved), Chain(), steps=40, lr=5e-3)[1]
        )
        for saved in ("8bit", "exact")
    }
    assert curves["exact"][0] - curves["exact"][-1] > 1
    off = curves["8bit"] - curves["exact"]
    assert float(off.abs().max()) < 0.15 and float(off[-10:].mean().abs()) < 0.06
