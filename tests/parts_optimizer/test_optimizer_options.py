"""The contract of every optimizer option: what is declared is what is kept, and the neutral setting is torch's own."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from haversack.codecs.moment_codes import make_moment_code, moment_values
from haversack.describe.checkpoint import dtype_name, torch_dtype
from haversack.engine.composed_optimizer import ComposedOptimizer
from haversack.errors import PlanError, UsageError
from haversack.ledger import StoredTensor
from haversack.parts.base import all_parts
from haversack.parts.optimizer.adafactor import Adafactor
from haversack.parts.optimizer.adamw import AdamW
from haversack.parts.optimizer.base import PIECE_ELEMENTS, Moment, OptimizerOption, OptimizerPart
from haversack.parts.optimizer.block_state import BlockState
from haversack.parts.optimizer.expanded_float8 import ExpandedFloat8
from haversack.parts.optimizer.float_state import FloatState
from haversack.parts.optimizer.growth_limit import limit_growth
from haversack.parts.optimizer.integer_state import IntegerState
from haversack.parts.optimizer.muon import Muon
from haversack.parts.optimizer.natural_adamw import NaturalAdamW
from haversack.parts.optimizer.norm_scaled_residual import NormScaledResidual
from haversack.parts.optimizer.random_projection import RandomProjection
from haversack.parts.optimizer.random_rows import RandomRows
from haversack.parts.optimizer.scaled_at_initialization import ScaledAtInitialization
from haversack.parts.optimizer.scaled_gradient import ScaledGradient
from haversack.parts.optimizer.sgd_momentum import SGDMomentum
from haversack.parts.optimizer.signed_residual import SignedResidual
from haversack.parts.optimizer.singular_vectors import SingularVectors
from haversack.recipes.base import all_recipes, optimizer_names, optimizer_option

RULES = (AdamW(), SGDMomentum(), Muon(), ScaledAtInitialization())
SUBSPACES = (None, SingularVectors(refresh_steps=3), RandomProjection(rank=5), RandomRows(refresh_steps=2))
STATES = (None, FloatState(), BlockState(8, 64, 0), BlockState(4, 32, 0), ExpandedFloat8(32, 0), IntegerState(4, 32))
RESIDUALS = (NormScaledResidual(), SignedResidual(), ScaledGradient())
OPTIONS = [
    OptimizerOption(rule, subspace, state) for rule, subspace, state in itertools.product(RULES, SUBSPACES, STATES)
]
OPTIONS += [
    OptimizerOption(AdamW(), subspace, state, residual)
    for subspace, state, residual in itertools.product(SUBSPACES[1:], (None, BlockState(8, 64, 0)), RESIDUALS)
]
OPTIONS += [OptimizerOption(Adafactor(), state=state) for state in (None, FloatState())]
OPTIONS += [
    option for recipe in all_recipes().values() if recipe.resident == "optimizer" for option in recipe.options()
]

NEUTRAL: dict[str, tuple[OptimizerOption, Callable[..., torch.optim.Optimizer]]] = {
    "adamw": (OptimizerOption(AdamW()), lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False)),
    "sgdm": (OptimizerOption(SGDMomentum()), lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=False)),
    "adafactor": (OptimizerOption(Adafactor()), lambda p: torch.optim.Adafactor(p, lr=1e-2, foreach=False)),
    "muon": (OptimizerOption(Muon()), lambda p: torch.optim.Muon(p, lr=1e-2)),
}


def weights_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)) for shape in shapes]


def give_gradients(weights: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype) * 0.02


def trained(option: OptimizerOption, weights: list[nn.Parameter], steps: range) -> ComposedOptimizer:
    optimizer = ComposedOptimizer(weights, option, matrices=weights, lr=1e-2, seed=3)
    for step in steps:
        give_gradients(weights, step)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: o.label)
def test_keeps_what_it_declares(option: OptimizerOption) -> None:
    """Every shape's way: wide, tall, a vector, one number, a stack; states are made of the declared tensors alone."""
    for dtype in (torch.float32, torch.bfloat16):
        weights = weights_of((8, 40), (40, 9), (21,), (1,), (2, 3, 4), dtype=dtype)
        before = [(w.detach().clone(), w.grad) for w in weights]
        optimizer = ComposedOptimizer(weights, option, matrices=weights[:2], lr=0.1)
        for step in range(4):
            give_gradients(weights, step)
            grads = [w.grad.clone() for w in weights if w.grad is not None]
            optimizer.step()
            assert all(torch.equal(w.grad, g) for w, g in zip(weights, grads, strict=True) if w.grad is not None)
        for i, weight in enumerate(weights):
            state = optimizer.state[weight]
            declared = option.stored(tuple(weight.shape), dtype_name(dtype), inner=i < 2)
            assert {StoredTensor(k, dtype_name(v.dtype), tuple(v.shape)) for k, v in state.items()} == set(declared)
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values()}
            assert sum(storages.values()) == option.stored_bytes(tuple(weight.shape), dtype_name(dtype), inner=i < 2)
            assert weight.isfinite().all() and not torch.equal(weight, before[i][0])


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: o.label)
def test_a_resumed_run_is_the_unbroken_one(option: OptimizerOption, tmp_path: Path) -> None:
    """To the bit, with the state as safetensors and the rest as JSON; across a refresh of the basis."""
    shapes = ((8, 40), (40, 9), (21,))
    unbroken = weights_of(*shapes, dtype=torch.bfloat16)
    trained(option, unbroken, range(5))
    weights = weights_of(*shapes, dtype=torch.bfloat16)
    saved = trained(option, weights, range(2)).state_dict()
    flat = {f"{number}.{name}": tensor for number, state in saved["state"].items() for name, tensor in state.items()}
    save_file(flat, tmp_path / "state.safetensors")
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(tmp_path / "state.safetensors").items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    resumed = ComposedOptimizer(weights, option, matrices=weights, seed=3)
    resumed.load_state_dict({"state": state, "param_groups": json.loads(json.dumps(saved["param_groups"]))})
    for step in range(2, 5):
        give_gradients(weights, step)
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, unbroken, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NEUTRAL)
def test_the_neutral_setting_is_torchs_own(name: str, dtype: torch.dtype) -> None:
    """To the bit, over pieces and their rests."""
    option, make = NEUTRAL[name]
    shapes = [(300, 500), (40, 9)] if name == "muon" else [(300, 500), (40, 9), (21,), (1,), (2, 3, 4)]
    assert PIECE_ELEMENTS < 300 * 500
    ours, theirs = weights_of(*shapes, dtype=dtype), weights_of(*shapes, dtype=dtype)
    a, b = ComposedOptimizer(ours, option, matrices=ours, lr=1e-2), make(theirs)
    assert option.is_neutral
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        a.step()
        b.step()
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.id)
def test_all_rows_in_32_bits_are_the_rule(rule: Any) -> None:
    """A subspace that leaves nothing out, states as wide as the weight, and a residual with nothing to do."""
    full = OptimizerOption(rule, RandomRows(rank=64, refresh_steps=100), FloatState(), SignedResidual())
    ours, theirs = weights_of((16, 40), (30, 9)), weights_of((16, 40), (30, 9))
    trained(full, ours, range(4))
    trained(OptimizerOption(rule), theirs, range(4))
    tolerance = 1e-6 if rule.elementwise else 1e-4  # Muon's products see the shorter side first, in bfloat16
    assert all(torch.allclose(a, b, atol=tolerance) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", optimizer_names())
def test_the_loss_goes_down(name: str) -> None:
    """A quarter off within 60 steps, on a small network that learns another's outputs."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 24, generator=generator)
    targets = torch.tanh(inputs @ torch.randn(24, 12, generator=generator)) @ torch.randn(12, 8, generator=generator)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 8))
    matrices = [p for p in net.parameters() if p.ndim == 2]
    option = optimizer_option(name)
    lr = {"sgd-momentum": 0.02, "muon-rule": 0.02, "scaled-at-initialization": 0.3}.get(option.rule.id, 0.005)
    optimizer = ComposedOptimizer(net.parameters(), option, matrices=matrices, lr=lr)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(net(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


def test_states_of_the_papers() -> None:
    """Numbers kept of an m x n matrix, m <= n: their formulas, and scalars."""
    m, n, r = 512, 1376, 128
    kept = {name: optimizer_option(name).stored_bytes((m, n), "F32", inner=True) for name in optimizer_names()}
    assert kept["adamw"] == 8 * m * n + 4
    assert kept["galore"] == 4 * (m * r + 2 * n * r) + 4  # Zhao et al., table 1
    assert kept["fira"] == kept["galore"] + 4
    assert kept["apollo"] == 4 * 2 * n * r + 8  # Zhu et al., table 1: 2nr + 2
    assert kept["apollo-mini"] == 4 * (2 * n + 2)  # 2n + 2
    assert kept["frugal"] == 8 * m * n // 4 + 4
    assert kept["sgd-sai"] == 4 * m * n + 4 == kept["adamw"] // 2 + 2
    assert kept["adamw8bit"] == 2 * m * n + 2 * 4 * ceil(m * n / 256) + 4
    assert kept["coat"] == 2 * m * n + 2 * 8 * ceil(m * n / 128) + 4
    assert kept["natural-galore"] == kept["galore"] + 4 * 4 * n * r  # and the last four gradients
    assert kept["adamw4bit"] == m * n + 2 * 4 * ceil(m * n / 128) + 4


def test_reductions_of_the_papers() -> None:
    """On the matrices of a 7B Llama's layers, in 16 bits: GaLore's 65.5% less than AdamW's, 82.5% with 8 bits; SGD-SaI's half."""
    hidden, wide = 4096, 11008
    shapes = [(hidden, hidden)] * 4 + [(hidden, wide)] * 2 + [(wide, hidden)]

    def less(name: str) -> float:
        kept = {
            n: sum(optimizer_option(n).stored_bytes(s, "BF16", inner=True) for s in shapes) for n in (name, "adamw")
        }
        return 1 - kept[name] / kept["adamw"]

    assert less("galore") >= 0.655 and less("galore8bit") >= 0.825
    assert less("apollo-mini") >= 0.999
    assert less("sgd-sai") == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: o.label)
def test_round_trips_through_json(option: OptimizerOption) -> None:
    assert OptimizerOption.from_dict(json.loads(json.dumps(option.to_dict()))) == option


def test_no_two_recipes_keep_equal_bytes_and_values() -> None:
    seen = {}
    for name in optimizer_names():
        option = optimizer_option(name)
        weights = weights_of((256, 384))
        trained(option, weights, range(2))
        key = (option.stored((256, 384), "F32", inner=True), weights[0].detach().numpy().tobytes())
        assert key not in seen, f"{name} is {seen[key]}"
        seen[key] = name


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("shape", "block_size"), [((96, 256), 256), ((37, 301), 64)])
def test_the_compiled_pass_is_the_same_step(
    bits: int, shape: tuple[int, int], block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by torch's operations; a code may fall to its neighbour where a sum is rounded otherwise. The second shape ends in part of a block."""
    option = OptimizerOption(AdamW(), state=BlockState(bits, block_size, 0))
    passed: list[int] = []
    compiled = ComposedOptimizer._compiled
    monkeypatch.setattr(
        ComposedOptimizer, "_compiled", lambda self, *args: passed.append(compiled(self, *args)) or passed[-1]
    )
    ours = weights_of(shape)
    states = [trained(option, ours, range(6)).state[ours[0]]]
    assert set(passed) == {ours[0].numel() // block_size * block_size}
    monkeypatch.setattr(ComposedOptimizer, "_compiled", lambda self, *args: 0)
    theirs = weights_of(shape)
    states.append(trained(option, theirs, range(6)).state[theirs[0]])
    assert torch.allclose(ours[0], theirs[0], atol=1e-4)  # steps are of 1e-2
    for name, tensor in states[0].items():
        other = states[1][name]
        if tensor.dtype == torch.uint8:
            codes = [torch.stack([t & 15, t >> 4]) if bits == 4 else t for t in (tensor, other)]
            off = (codes[0].int() - codes[1].int()).abs()
            assert off.max() <= 1 and (off > 0).float().mean() < 0.02
        else:
            assert torch.allclose(tensor, other, rtol=1e-2)


def test_fewer_bits_err_more() -> None:
    """Against AdamW's own steps, on the same gradients."""
    exact = weights_of((64, 256))
    trained(OptimizerOption(AdamW()), exact, range(6))
    errors = []
    for state in (FloatState(), FloatState("BF16"), BlockState(8, 256), BlockState(4, 128)):
        weights = weights_of((64, 256))
        trained(OptimizerOption(AdamW(), state=state), weights, range(6))
        errors.append((weights[0] - exact[0]).norm().item() / 1e-2 / 128)
    assert errors[0] == 0 and errors == sorted(errors) and errors[2] < 0.15


def test_stretched_exponents_err_less() -> None:
    """Of numbers over three orders of magnitude, which fill little of an 8-bit float's range."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4096, generator=generator) * 10 ** (-3 * torch.rand(4096, generator=generator))
    values[7::100] = 0.0
    errors = []
    for expand in (False, True):
        precision, moment = ExpandedFloat8(64, 0, expand), Moment("m", (4096,), signed=True)
        stored = {t.name: torch.zeros(t.shape, dtype=torch_dtype(t.dtype)) for t in precision.stored(moment)}
        precision.write(stored, {}, moment, slice(0, 4096), values)
        found = precision.read(stored, {}, moment, slice(0, 4096))
        assert (found[7::100] == 0).all()
        errors.append(float(((found - values) / values.abs().clamp(min=1e-30)).square().mean().sqrt()))
    assert errors[1] < 0.85 * errors[0], errors


def test_blocks_of_zeros_and_of_equal_numbers_come_back() -> None:
    values = torch.zeros(4, 32)
    values[1] = -0.25
    values[2, 5] = 3.0
    precision, moment = ExpandedFloat8(32, 0), Moment("m", (128,), signed=True)
    stored = {t.name: torch.zeros(t.shape, dtype=torch_dtype(t.dtype)) for t in precision.stored(moment)}
    precision.write(stored, {}, moment, slice(0, 128), values)
    assert torch.equal(precision.read(stored, {}, moment, slice(0, 128)).view(4, 32), values)


def test_natural_gradients_shrink_what_repeats() -> None:
    """The part that the last gradients have in common, against the rest of the same length."""
    generator = torch.Generator().manual_seed(0)
    common, rest = torch.randn(2, 5, 7, generator=generator)
    rule = NaturalAdamW(history=3, damping=0.1)
    last = torch.stack([common, common, common])
    grad = common / common.norm() + rest / rest.norm()
    natural = rule._natural(grad, last)
    assert natural.norm() == pytest.approx(float(grad.norm()), rel=1e-5)
    before, after = (float((g * common).sum() / g.norm() / common.norm()) for g in (grad, natural))
    assert after < 0.5 * before
    fisher = last.flatten(1).T @ last.flatten(1)
    dense = torch.linalg.solve(fisher + 0.1 * last.flatten(1).square().sum(1).mean() * torch.eye(35), grad.flatten())
    assert torch.allclose(natural.flatten() / natural.norm(), dense / dense.norm(), atol=1e-4)


@pytest.mark.parametrize(("bits", "signed"), itertools.product((4, 8), (True, False)))
def test_codes_are_the_nearest_values(bits: int, signed: bool) -> None:
    """Of every bfloat16 in range, checked against all values; and codes come back."""
    code = make_moment_code(bits, signed)
    values = torch.tensor(moment_values(bits, signed))
    assert len(set(values.tolist())) == 2**bits and values.abs().max() == 1
    shares = torch.linspace(-1 if signed else 0, 1, 4096).bfloat16().float()
    decoded = code.decode(code.encode(shares))
    best = (shares[:, None] - values).abs().min(1).values
    assert torch.allclose((decoded - shares).abs(), best, atol=1e-7)
    assert torch.equal(code.decode(code.encode(decoded)), decoded) or bits == 8  # 8-bit values are finer than bfloat16
    if signed or bits == 8:
        assert code.decode(code.encode(torch.zeros(2))).abs().max() == 0


def test_spikes_are_cut() -> None:
    last = torch.zeros(())
    assert limit_growth(torch.full((4,), 1.0), last, 1.01).norm() == 2.0
    assert limit_growth(torch.full((4,), 50.0), last, 1.01).norm() == pytest.approx(2.02)
    assert limit_growth(torch.full((4,), 50.0), last, 1.01).norm() == pytest.approx(2.02 * 1.01)
    assert limit_growth(torch.full((4,), 0.5), last, 1.01).norm() == 1.0 and last == 1.0


def test_singular_vectors_hold_most_of_a_gradient() -> None:
    subspace = SingularVectors(rank=4, refresh_steps=10)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(32, 6, generator=generator) @ torch.randn(6, 80, generator=generator)
    basis = subspace.basis(grad, 1, 0)
    kept = subspace.expand(subspace.reduce(grad, basis), basis, 32)
    exact = torch.linalg.svdvals(grad)
    assert (grad - kept).norm() == pytest.approx(exact[4:].norm().item(), rel=1e-3)


def test_bases_stay_until_they_are_refreshed() -> None:
    option = OptimizerOption(AdamW(), SingularVectors(rank=3, refresh_steps=2))
    bases = []
    for steps in range(1, 4):
        optimizer = trained(option, weights_of((8, 40)), range(steps))
        (state,) = optimizer.state.values()
        bases.append(state["basis"])
    assert torch.equal(bases[0], bases[1]) and not torch.equal(bases[1], bases[2])


def test_random_bases_come_back_from_their_seed_alone() -> None:
    for subspace in (RandomProjection(rank=3, refresh_steps=5), RandomRows(rank=3, refresh_steps=5)):
        grad = torch.randn(16, 20)
        asked = ((1, 0), (5, 0), (6, 0), (1, 1))
        first, again, later, other = (subspace.basis(grad, step, seed) for step, seed in asked)
        assert torch.equal(first, again) and not torch.equal(first, later) and not torch.equal(first, other)
        assert subspace.basis_moment(16) is None


def test_other_states_are_refused_and_nothing_is_lost() -> None:
    weights = weights_of((8, 40))
    saved = trained(OptimizerOption(AdamW()), weights, range(1)).state_dict()
    other = ComposedOptimizer(weights, optimizer_option("galore"), matrices=weights)
    with pytest.raises(UsageError, match="another optimizer or model"):
        other.load_state_dict(saved)
    with pytest.raises(UsageError, match="without any parameters"):
        ComposedOptimizer([], OptimizerOption(AdamW()), matrices=[])


def test_groups_schedules_and_closures_are_torchs() -> None:
    """Groups keep hyper-parameters of their own, AdamW's rate beside Muon's moves with it, and schedulers drive both."""
    weights = weights_of((8, 8), (5,))
    optimizer = ComposedOptimizer(
        [{"params": weights[:1], "weight_decay": 0.5}, {"params": weights[1:]}],
        OptimizerOption(Muon()),
        matrices=weights[:1],
        lr=1e-2,
    )
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2, 1e-3])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.01]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-3, 5e-4])
    give_gradients(weights, 0)
    assert optimizer.step(lambda: 7.0) == 7.0
    schedule.step()


def test_strided_weights_are_updated_in_place() -> None:
    for option in (OptimizerOption(AdamW()), optimizer_option("galore"), optimizer_option("adamw8bit")):
        plain = weights_of((96, 64))
        strided = [nn.Parameter(plain[0].detach().T.contiguous().T)]
        assert not strided[0].is_contiguous()
        trained(option, plain, range(3))
        trained(option, strided, range(3))
        assert torch.allclose(plain[0], strided[0], atol=1e-6)


def test_bad_settings_are_refused() -> None:
    for make, words in (
        (lambda: SingularVectors(rank=0), "rank is 0"),
        (lambda: SingularVectors(rank=1.5), "rank is 1.5"),
        (lambda: RandomProjection(refresh_steps=0), "refresh_steps is 0"),
        (lambda: BlockState(bits=3), "bits is 3"),
        (lambda: BlockState(block_size=100), "block_size is 100"),
        (lambda: FloatState("F64"), "dtype is 'F64'"),
        (lambda: ScaledGradient(most_growth=0.5), "most_growth is 0.5"),
        (lambda: OptimizerOption(Adafactor(), SingularVectors()), "needs whole gradients"),
        (lambda: OptimizerOption(AdamW(), residual=SignedResidual()), "there is no subspace"),
        (lambda: optimizer_option("adamx"), "must be one of adafactor"),
    ):
        with pytest.raises(UsageError, match=words):
            make()
    with pytest.raises(PlanError, match="wrong"):
        OptimizerOption.from_dict({"rule": {"part": "adamw-rule", "lrr": 1}})


def test_every_part_is_tried_here() -> None:
    tried = {part.id for option in OPTIONS for part in option.parts}
    registered = {part.id for part in all_parts().values() if issubclass(part, OptimizerPart)}
    assert tried == registered
    assert all(dataclasses.is_dataclass(part) for part in all_parts().values() if part.id in registered)
