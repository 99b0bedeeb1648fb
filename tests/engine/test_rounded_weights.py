"""Weights in 8 bits: right on average, as many bytes as declared, resumed to the bit, given back as they are, and trained as well as GaLore's."""

from __future__ import annotations

import dataclasses
from functools import partial
from math import ceil
from typing import Any

import pytest
import torch
from tests.describe.families import FAMILIES
from tests.engine.tiny import random_ids

from haversack.cost.training import training_cost
from haversack.describe.checkpoint import torch_dtype
from haversack.describe.model import describe_model
from haversack.describe.workload import TrainWorkload, TuneWorkload
from haversack.engine.rounded_weights import release_rounded, rounded_at_random, rounded_of
from haversack.engine.training_state import TrainingState, restore, state_of
from haversack.engine.training_step import TrainingStep
from haversack.errors import UsageError
from haversack.jobs.training_run import measure_tensors, open_model
from haversack.parts.optimizer.base import Moment
from haversack.parts.optimizer.integer_state import IntegerState
from haversack.parts.optimizer.lazy_singular_vectors import LazySingularVectors
from haversack.parts.optimizer.singular_vectors import SingularVectors
from haversack.recipes.base import optimizer_option

CONFIG: dict[str, Any] = {
    **FAMILIES["llama"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "head_dim": 16,
}
WORKLOAD = TrainWorkload(2, 32, precision="int8", optimizer="q-galore")


def stored_as(precision: IntegerState, values: torch.Tensor) -> torch.Tensor:
    """Values written and read again."""
    moment = Moment("m", tuple(values.shape), signed=True)
    stored = {t.name: torch.zeros(t.shape, dtype=torch_dtype(t.dtype)) for t in precision.stored(moment)}
    precision.write(stored, {}, moment, slice(0, values.numel()), values)
    return precision.read(stored, {}, moment, slice(0, values.numel())).view(values.shape)


def test_rounding_at_random_is_right_on_average_and_to_the_nearest_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, generator=generator)  # a whole block, and part of one
    torch.manual_seed(0)
    draws = torch.stack([stored_as(IntegerState(8, stochastic=True), values) for _ in range(2000)])
    step = torch.cat([values[:256].abs().max().expand(256), values[256:].abs().max().expand(44)]) / 127
    error = step / 2 / 2000**0.5  # at most: half a step is the largest deviation of a coin between two integers
    assert ((draws.mean(0) - values).abs() < 5 * error + 1e-6).all()
    assert ((draws - values).abs() <= 1.001 * step + 1e-6).all()
    nearest = stored_as(IntegerState(8), values)
    assert ((nearest - values).abs() <= 0.501 * step).all() and (
        (nearest - values).abs() > 5 * error
    ).float().mean() > 0.5
    wide = torch.stack([rounded_at_random(values).float() for _ in range(2000)])
    spacing = values.abs().log2().floor().exp2() / 128
    assert ((wide.mean(0) - values).abs() < 5 * spacing / 2 / 2000**0.5 + 1e-7).all()
    assert torch.equal(rounded_at_random(wide[0]).float(), wide[0])


def test_bytes_are_as_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = training_cost(describe_model(CONFIG), WORKLOAD)
    matrices = [(64, 64)] * 2 + [(32, 64)] * 2 + [(96, 64)] * 2 + [(64, 96)]
    codes = sum(m * n + 4 * ceil(m * n / 256) for m, n in matrices)
    assert cost.staying["packed weights"] == 3 * codes
    m, n, r = 512, 1376, 128
    kept = optimizer_option("q-galore").stored_bytes((m, n), "F32", inner=True)
    projector = m * r // 2 + 4 * ceil(m * r / 256)
    assert kept == projector + 2 * (r * n + 4 * ceil(r * n / 256)) + 4 * 4  # 8-bit moments, a count and three scalars
    always = dataclasses.replace(optimizer_option("q-galore"), subspace=LazySingularVectors(refresh_steps=1))
    monkeypatch.setattr("haversack.engine.optimizers.optimizer_option", lambda name: always)  # as is planned for
    measured = measure_tensors(CONFIG, WORKLOAD)
    assert measured["residents"] == {owner: n for owner, n in cost.staying.items() if owner != "batch"}
    passes = max(cost.ledger().total_bytes(p) for p in ("forward", "loss", "backward"))
    assert measured["tensor_peaks"]["step 1"] == pytest.approx(passes, rel=0.01, abs=64 << 10)
    assert measured["tensor_peaks"]["update 1"] == pytest.approx(
        cost.ledger().total_bytes("update"), rel=0.01, abs=64 << 10
    )
    assert measured["tensor_peaks"]["load"] <= cost.load_bytes + (64 << 10)


def new_step(workload: TrainWorkload = WORKLOAD, family: dict[str, Any] = CONFIG, lr: float = 1e-2) -> TrainingStep:
    described = describe_model(family)
    model = open_model(described, torch.bfloat16, "sdpa", seed=1)
    step = TrainingStep(model, described, workload).begin(described)
    for optimizer in step.optimizer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
    return step


class Held:
    """A state as a checkpoint would give it back."""

    def __init__(self, state: TrainingState):
        self.tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
        self.values = dict(state.values)
        self.names = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        return self.tensors[name]


def test_a_resumed_run_is_the_unbroken_one() -> None:
    batch = [{"ids": random_ids(2, 32)}]
    unbroken = new_step()
    for _ in range(2):
        unbroken.run(batch)
    held = Held(state_of(unbroken))
    assert not any(name.endswith("proj.weight") for name in held.names)
    losses = [unbroken.run(batch) for _ in range(2)]
    resumed = new_step()
    restore(resumed, held)
    assert [resumed.run(batch) for _ in range(2)] == losses
    found, expected = state_of(resumed).tensors, state_of(unbroken).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ordinary_linears_come_back(family: str) -> None:
    step = new_step(TrainWorkload(2, 16, precision="int8"), FAMILIES[family])
    names = {
        name for name, _ in open_model(describe_model(FAMILIES[family]), torch.bfloat16, "sdpa").named_parameters()
    }
    first = float(step.loss(random_ids(2, 16)).detach())
    losses = [step.run([{"ids": random_ids(2, 16)}]) for _ in range(6)]
    assert losses[-1] < first
    step.model.eval()
    with torch.no_grad():
        before = step.model(random_ids(2, 16)).logits
        unpacked = {name: m.rounded.unpack(torch.bfloat16) for name, m in rounded_of(step.model).items()}
        release_rounded(step.model)
        assert not rounded_of(step.model)
        for name, matrix in unpacked.items():
            weight = step.model.get_parameter(f"{name}.weight")
            assert torch.equal(weight.T if family == "gpt2" else weight, matrix)
        assert torch.allclose(step.model(random_ids(2, 16)).logits, before, atol=0.02)  # biases are added elsewhere
    assert {name for name, _ in step.model.named_parameters()} == names


def test_fewer_decompositions_than_galore_and_a_loss_like_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On text with something to learn: a chain of tokens, each followed by one of three."""
    counts = {}
    losses = {}
    for name, workload in (
        ("galore", TrainWorkload(8, 32, precision="master", optimizer="galore")),
        ("q-galore", TrainWorkload(8, 32, precision="int8", optimizer="q-galore")),
    ):
        make: Any = {"galore": SingularVectors, "q-galore": partial(LazySingularVectors, patience=2)}[name]
        option = dataclasses.replace(optimizer_option(name), subspace=make(refresh_steps=4))
        made: list[int] = []
        kind = type(option.subspace)
        monkeypatch.setattr(
            kind, "basis", lambda self, *args, of=kind.basis, made=made: (made.append(1), of(self, *args))[1]
        )
        monkeypatch.setattr("haversack.engine.optimizers.optimizer_option", lambda asked, option=option: option)
        step = new_step(workload, lr=1e-2)
        generator = torch.Generator().manual_seed(0)
        followers = torch.randint(3, 60, (72, 3), generator=generator)
        found = []
        for _ in range(60):
            ids = torch.randint(3, 60, (8, 32), generator=generator)
            for place in range(1, 32):
                pick = torch.randint(0, 3, (8,), generator=generator)
                ids[:, place] = followers[ids[:, place - 1], pick]
            found.append(step.run([{"ids": ids}]))
        counts[name], losses[name] = len(made), sum(found[-10:]) / 10
        assert losses[name] < found[0] - 1
    assert counts["q-galore"] < 0.8 * counts["galore"], counts
    assert losses["q-galore"] < losses["galore"] + 0.1, losses


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="precision is 'int8' with method lora"):
        TuneWorkload(1, 8, precision="int8")
    with pytest.raises(UsageError, match="bits is 3"):
        IntegerState(3)
    for field, value in (("patience", 0), ("similarity", 1.5), ("bits", 2)):
        with pytest.raises(UsageError, match=f"{field} is {value}"):
            LazySingularVectors(**{field: value})
