"""One folder at any size: which blocks a budget holds, what they take, and a model that shrinks and grows in place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.engine.tiny import load_whole, random_ids, save_tiny
from tests.jobs.test_pack_and_load import MACHINE, overwrite_with_stored

import haversack
from haversack.cost.stacks import order_of_blocks
from haversack.describe.model import describe_model
from haversack.describe.workload import ServeWorkload
from haversack.engine.elastic import blocks_within, held_blocks
from haversack.engine.load import open_packed
from haversack.engine.packed_tensor import packed_tensors
from haversack.errors import DoesNotFitError, PlanError, UsageError
from haversack.formats.packed_folder import PackedFolder
from haversack.jobs.pack import pack
from haversack.jobs.run import load
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.dropped import DroppedGrid
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.parts.weights.residual_planes import ResidualPlanes
from haversack.parts.weights.sign_stack import SignStack
from haversack.plan.elastic import elastic_answer, plan_at, stacked_option
from haversack.plan.question import Question
from haversack.plan.schema import Plan

PLANES = WeightOption(IntegerGrid(2, 64), NearestRounding(), corrections=(ResidualPlanes(3, 64),))
SIGNS = WeightOption(DroppedGrid(), NearestRounding(), corrections=(SignStack(4, 2),))
IDS = random_ids(2, 20)


@pytest.fixture(scope="module", params=[PLANES, SIGNS], ids=["planes", "signs"])
def elastic(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Plan]:
    """The unpacked folder, the packed one, and its plan."""
    folder = tmp_path_factory.mktemp("elastic")
    source = save_tiny("llama", folder / "model")
    answer = asked(source, request.param)
    pack(describe_model(source), answer.plan, folder / "packed")
    return source, folder / "packed", answer.plan


def asked(source: Path, option: WeightOption, budget: int | None = None):
    model = describe_model(source)
    draw = torch.Generator().manual_seed(1)
    number = option.stack.blocks - option.least_blocks + 1
    damages = {}
    for site in model.weights:
        first = 0.1 + float(torch.rand(1, generator=draw))
        damages[site.id] = tuple(first / 4**i for i in range(number))
    question = Question(model, ServeWorkload(24, 9), MACHINE, budget, "tensor")
    return elastic_answer(question, option, damages)


def held_bytes(model) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in packed_tensors(model)}
    return sum(storages.values())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def test_every_size_is_predicted_to_the_byte(elastic) -> None:
    """At each of many budgets: the longest prefix that fits, whose bytes are counted on storages, and an ordinary plan's prediction."""
    source, folder, plan = elastic
    record, model = plan.elastic, describe_model(source)
    whole = plan.prediction.timeline["load"]["weights"]["device"]
    assert [b.peak_bytes for b in record.blocks] == sorted(b.peak_bytes for b in record.blocks)
    for number in range(0, len(record.blocks) + 1, 7):
        peak = record.blocks[number - 1].peak_bytes if number else record.floor_peak_bytes
        for budget in (peak, peak + 1):
            loaded = load(folder, budget)
            assert sum(loaded.haversack.held.values()) == record.floor_blocks * len(plan.weights) + number
            assert held_bytes(loaded) == whole - sum(b.num_bytes for b in record.blocks[number:])
        at = plan_at(plan, model, MACHINE, number)
        assert at.prediction.peak_bytes == peak and at.prediction.timeline["load"]["weights"]["device"] == held_bytes(
            loaded
        )
        assert at.elastic is None and Plan.from_json(at.to_json()) == at
    assert plan.prediction.peak_bytes == record.blocks[-1].peak_bytes


def test_a_budget_leaves_out_less_than_the_next_block(elastic) -> None:
    _, folder, plan = elastic
    record, stored = plan.elastic, json.loads(PackedFolder.open(folder).plan_text)
    for budget in range(record.floor_peak_bytes, plan.prediction.peak_bytes, 997):
        number = blocks_within(stored, budget, folder)
        peak = record.blocks[number - 1].peak_bytes if number else record.floor_peak_bytes
        assert peak <= budget < record.blocks[number].peak_bytes
        assert budget - peak < record.blocks[number].peak_bytes - peak
    assert blocks_within(stored, 2 * plan.prediction.peak_bytes, folder) == len(record.blocks)


def test_a_model_shrinks_and_grows_in_place(elastic) -> None:
    _, folder, plan = elastic
    record = plan.elastic
    middle, small = record.blocks[len(record.blocks) // 2].peak_bytes, record.floor_peak_bytes
    loaded = load(folder)
    whole, whole_bytes = logits(loaded), held_bytes(loaded)
    seen = {}
    for budget in (middle, small, middle, 10**9):
        assert haversack.resize(loaded, budget) == held_bytes(loaded)
        fresh = load(folder, budget)
        assert held_bytes(fresh) == held_bytes(loaded) and torch.equal(logits(fresh), logits(loaded))
        seen[budget] = held_bytes(loaded)
    assert seen[small] < seen[middle] < seen[10**9] == whole_bytes
    assert torch.equal(logits(loaded), whole)
    out = loaded.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 24)


def test_a_prefix_computes_with_the_matrices_that_it_holds(elastic) -> None:
    source, folder, plan = elastic
    loaded = load(folder, plan.elastic.blocks[len(plan.elastic.blocks) // 2].peak_bytes)
    dense = load_whole(source, torch.float32, "eager")
    overwrite_with_stored(dense, loaded)
    got, want = logits(loaded), logits(dense)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3 * float(want.abs().max()))


def test_plain_transformers_takes_a_budget(elastic) -> None:
    from transformers import AutoModelForCausalLM

    _, folder, plan = elastic
    loaded = AutoModelForCausalLM.from_pretrained(folder, budget=plan.elastic.floor_peak_bytes)
    assert held_bytes(loaded) == sum(
        row.stored_bytes for row in plan_at(plan, loaded.haversack.described, MACHINE, 0).weights
    )


def test_blocks_lie_in_the_order_in_which_they_are_taken(elastic) -> None:
    """So that a prefix of the order is a stretch of the file: among tensors of one alignment, by which files are ordered."""
    _, folder, plan = elastic
    packed = open_packed(folder)
    ends: dict[int, int] = {}
    seen: set[str] = set()
    for number in range(len(plan.elastic.blocks) + 1):
        held = held_blocks(packed.plan, number)
        tensors = [t for site in held for t in replace(packed, held=held).site_tensors(site).values()]
        fresh = [t for t in tensors if t.name not in seen]
        for tensor in fresh:
            assert tensor.start >= ends.get(min(64, tensor.num_bytes & -tensor.num_bytes), 0), tensor.name
        for tensor in fresh:
            alignment = min(64, tensor.num_bytes & -tensor.num_bytes)
            ends[alignment] = max(ends.get(alignment, 0), tensor.stop)
        seen |= {t.name for t in fresh}
    assert len(seen) == sum(len(entry.tensors) for entry in packed.folder.manifest.sites.values())


def test_a_ceiling_keeps_the_blocks_that_fit(elastic) -> None:
    source, _, plan = elastic
    option = PLANES if plan.elastic.floor_blocks == 0 else SIGNS
    ceiling = plan.elastic.blocks[10].peak_bytes
    found = asked(source, option, ceiling)
    assert found.fits and found.plan.elastic.blocks == plan.elastic.blocks[:11]
    assert found.plan.prediction.peak_bytes == ceiling
    short = asked(source, option, plan.elastic.floor_peak_bytes - 1)
    assert not short.fits and short.shortfall_bytes == 1
    with pytest.raises(DoesNotFitError):
        short.require_fit()


def test_blocks_that_spare_most_per_byte_come_first() -> None:
    """And one that spares little comes before another for the sake of a third that spares much."""
    order = order_of_blocks(
        {"a": (1.0, 0.5, 0.4), "b": (1.0, 0.99, 0.2), "c": (3.0, 0.0)}, {"a": (1, 1), "b": (1, 1), "c": (100,)}
    )
    assert order == ("a", "b", "b", "a", "c")


def test_what_can_not_be_asked_is_refused(elastic, tmp_path: Path) -> None:
    source, folder, plan = elastic
    with pytest.raises(DoesNotFitError, match="at least") as caught:
        load(folder, plan.elastic.floor_peak_bytes - 1)
    assert caught.value.shortfall_bytes == 1
    loaded = load(folder)
    before = held_bytes(loaded)
    with pytest.raises(DoesNotFitError):
        haversack.resize(loaded, 1)
    with pytest.raises(UsageError):
        haversack.resize(loaded, "much")
    assert held_bytes(loaded) == before
    with pytest.raises(UsageError, match="not loaded from a packed folder"):
        haversack.resize(load_whole(source, torch.float32), 10**9)
    pack(describe_model(source), plan_at(plan, describe_model(source), MACHINE, 3), tmp_path / "plain")
    with pytest.raises(UsageError, match="--elastic"):
        load(tmp_path / "plain", 10**9)
    with pytest.raises(UsageError, match="--elastic"):
        haversack.resize(load(tmp_path / "plain"), 10**9)
    for recipes in (("gptq",), ("bitstack", "any-precision"), ("kivi",)):
        with pytest.raises(UsageError, match="in blocks"):
            stacked_option(recipes)
    edited = plan.model_copy(update={"elastic": plan.elastic.model_copy(update={"blocks": plan.elastic.blocks[1:]})})
    with pytest.raises(PlanError, match="not those of its option"):
        Plan.from_json(edited.sealed().to_json())
