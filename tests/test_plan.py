"""Plans: answers, infeasible questions, the inverted question, round trips, and what an edit does."""

from __future__ import annotations

import json

import pytest
from tests.describe.families import FAMILIES

from haversack.cost.damage import NONE, Damage
from haversack.describe.machine import Disk, Machine, Rates
from haversack.describe.model import describe_model
from haversack.describe.workload import ServeWorkload
from haversack.errors import DoesNotFitError, MachineError, PlanError, UsageError
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.elsewhere import Elsewhere
from haversack.parts.kv.far_values import FarValues
from haversack.parts.kv.key_cells import KeyCells
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.plan.make import make_plan
from haversack.plan.question import Answer, Question
from haversack.plan.schema import Plan

MACHINE = Machine("test", 2, 2**35, 2**35)
BIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 8192, "dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def big():
    return describe_model(BIG)


def ask(model, budget: int | None, **changes) -> Answer:
    workload = changes.pop("workload", ServeWorkload(768, 256))
    return make_plan(Question(model, workload, MACHINE, budget, **changes))


def test_codes_that_only_a_config_names_are_told_of(big) -> None:
    """A published AWQ checkpoint takes a quarter of what its config alone is planned as."""
    config = {
        **BIG,
        "num_hidden_layers": 2,
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128},
    }
    notes = ask(describe_model(config), 2**36).plan.notes
    assert [note for note in notes if "stored as awq" in note and "name the whole folder" in note]
    assert not [note for note in ask(big, 2**36).plan.notes if "stored as" in note]


def test_above_need_nothing_is_given_up(big) -> None:
    answer = ask(big, 40 * 2**30)
    assert answer.fits and answer.plan.prediction.damage.nats == 0
    assert all(row.option == {} and row.stored_bytes == row.neutral_bytes for row in answer.plan.weights)
    weights = answer.plan.prediction.timeline["decode"]["weights"]["device"]
    assert weights == sum(site.num_bytes for site in big.weights)


def test_prefill_by_8_bit_activations_takes_the_rate_of_integers(big) -> None:
    """Products alone are between the two; reading is the same, and far below."""
    rates = Rates({2: 1e14}, matmul_flops_per_second={"bf16": {2: 1e12}, "int8": {2: 2e12}})
    machine = Machine("test", 2, 2**35, 2**35, rates=rates)
    seconds = {}
    for bits in (16, 8):
        option = WeightOption(grid=IntegerGrid(8, activation_bits=bits), rounding=NearestRounding())
        damages = {site.id: {option: NONE} for site in big.weights}
        question = Question(big, ServeWorkload(768, 256), machine, 2**35, weight_damages=damages)
        seconds[bits] = make_plan(question).plan.prediction.prefill_seconds
    assert seconds[16] == pytest.approx(2 * seconds[8])


@pytest.mark.parametrize("gib", [5, 6, 8, 12])
def test_plans_keep_their_budget_and_use_it(big, gib: int) -> None:
    answer = ask(big, gib * 2**30)
    assert answer.fits
    assert 0.9 * gib * 2**30 < answer.plan.prediction.peak_bytes <= gib * 2**30
    assert answer.plan.prediction.damage.label in ("cited", "unknown")


def test_more_bytes_never_cost_more_damage(big) -> None:
    known = [ask(big, gib * 2**30) for gib in (8, 10, 12)]
    damages = [sum(row.damage or 0.0 for row in answer.plan.weights) for answer in known]
    assert damages == sorted(damages, reverse=True)


def test_where_nothing_fits_the_smallest_is_named(big) -> None:
    answer = ask(big, 2**29)
    assert not answer.fits and answer.shortfall_bytes >= answer.plan.prediction.peak_bytes - 2**29
    with pytest.raises(DoesNotFitError, match="short") as caught:
        answer.require_fit()
    assert caught.value.shortfall_bytes == answer.shortfall_bytes and caught.value.owners
    assert "would do" in (caught.value.cheapest_change or "")
    assert ask(big, 2**29 + answer.shortfall_bytes).fits


def test_streaming_where_nothing_resident_fits(big) -> None:
    answer = ask(big, 3 * 2**30)
    assert answer.fits
    placements = {row.placement["part"] for row in answer.plan.weights}
    assert "streamed" in placements
    assert "weights (stream window)" in answer.plan.prediction.timeline["decode"]


def test_the_question_turns_round(big) -> None:
    answer = ask(big, None, max_damage=0.05)
    assert answer.fits and answer.plan.prediction.peak_bytes < big.num_bytes / 2
    assert sum(row.damage or 0.0 for row in answer.plan.weights) <= 0.05


def test_a_plan_is_a_file_that_notices_edits(big) -> None:
    plan = ask(big, 8 * 2**30).plan
    assert Plan.from_json(plan.to_json()) == plan
    edited = json.loads(plan.to_json())
    edited["weights"][0]["stored_bytes"] += 1
    with pytest.raises(PlanError, match="changed after it was made"):
        Plan.from_json(json.dumps(edited))
    edited["weights"][0]["stored_bytes"] = "many"
    with pytest.raises(PlanError, match=r"weights\.0\.stored_bytes"):
        Plan.from_json(json.dumps(edited))


def test_the_same_question_gets_the_same_plan(big) -> None:
    assert ask(big, 6 * 2**30).plan.prediction_hash == ask(big, 6 * 2**30).plan.prediction_hash


def test_context_beyond_the_model_is_refused(big) -> None:
    with pytest.raises(UsageError, match="8192"):
        ask(big, 2**35, workload=ServeWorkload(8000, 1000))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "mixtral", "gpt_oss"])
def test_every_family_gets_a_plan(family: str) -> None:
    model = describe_model({**FAMILIES[family], "dtype": "bfloat16"})
    answer = ask(model, 2**30, workload=ServeWorkload(24, 8), budget_kind="tensor")
    assert answer.fits and len(answer.plan.weights) == len(model.weights)


@pytest.mark.parametrize(
    ("part", "far"), [(FarValues(64), 1), (KeyCells(64, scan_tokens=128), 2)], ids=["values", "both"]
)
def test_a_cache_on_two_tiers_is_booked_on_both_and_waits_for_its_link(big, part, far: int) -> None:
    """As many bytes as the options declare on either; a step takes longer by what it fetches, at the disk's rate."""
    rates = Rates({2: 1e10}, disk_read_bytes_per_second=1e8)
    machine = Machine("test", 2, 2**35, 2**35, rates=rates)
    workload, found = ServeWorkload(768, 256), {}
    option = KVOption(None, part)
    for name, its in (("whole", KVOption()), ("far", option)):
        damages = {site.id: {KVOption(): Damage(1.0, "measured"), its: NONE} for site in big.attention}
        found[name] = make_plan(Question(big, workload, machine, 2**35, kv_damages=damages)).plan.prediction
    sizes = {"batch_size": 1, "capacity_tokens": workload.cache_tokens, "dtype": "BF16"}
    booked = found["far"].timeline["decode"]["kv"]
    declared = {tier: sum(option.stored_bytes(s, tier=tier, **sizes) for s in big.attention) for tier in booked}
    assert booked == declared and set(booked) == {"device", "disk"}
    behind = (workload.cache_tokens - 64) // 64 * 64
    assert booked["disk"] == 32 * 8 * behind * 128 * 2 * far
    assert found["whole"].timeline["decode"]["kv"].keys() == {"device"}
    link_seconds = sum(option.link_bytes(site, **sizes) for site in big.attention) / 1e8
    times = [found[name].seconds_per_token for name in ("whole", "far")]
    assert times[1] - times[0] == pytest.approx(link_seconds, rel=0.2)


def test_a_drive_that_attends_is_faster_than_fetching_by_what_does_not_cross_its_link(big) -> None:
    """8,192 tokens of 32 layers: a step's queries and outputs instead of every key and value; the drive reads four times as fast as its link carries."""
    rates, workload = Rates({2: 1e10}, disk_read_bytes_per_second=1e9), ServeWorkload(8000, 192)
    drive = Disk("/", 2**40, 2**40, attention_bytes_per_second=4e9)
    machine = Machine("test", 2, 2**35, 2**35, disk=drive, rates=rates)

    def predict(option: KVOption, machine: Machine = machine):
        damages = {site.id: {KVOption(): Damage(1.0, "measured"), option: NONE} for site in big.attention}
        return make_plan(Question(big, workload, machine, 2**35, kv_damages=damages)).plan.prediction

    there, fetched = (predict(KVOption(represent=Elsewhere(attends))) for attends in (True, False))
    tokens = workload.cache_tokens
    for found in (there, fetched):
        assert found.timeline["decode"]["kv"] == {"device": 0, "disk": 32 * tokens * 8 * 2 * 128 * 2}
    sizes = {"batch_size": 1, "capacity_tokens": tokens, "dtype": "BF16"}
    links = [32 * KVOption(represent=Elsewhere(a)).link_bytes(big.attention[0], **sizes) for a in (True, False)]
    assert links == [32 * (8 * 2 * 128 * 2 + 32 * (2 * 128 * 2 + 4)), 32 * 8 * 2 * 128 * 2 * (tokens + 1)]
    read_there = fetched.timeline["decode"]["kv"]["disk"] / 4e9
    gained = (links[1] - links[0]) / 1e9 - read_there
    assert fetched.seconds_per_token - there.seconds_per_token == pytest.approx(gained, rel=1e-3)
    with pytest.raises(MachineError, match="needs a drive that computes, but test names none"):
        predict(KVOption(represent=Elsewhere()), Machine("test", 2, 2**35, 2**35, rates=rates))
