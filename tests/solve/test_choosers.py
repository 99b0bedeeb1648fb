"""Published choosers against brute force, against each other, and on questions that have no room."""

import itertools
import random

import pytest

from haversack.cost.damage import NONE, Damage
from haversack.describe.machine import Machine
from haversack.describe.model import describe_model
from haversack.describe.workload import ServeWorkload
from haversack.errors import UsageError
from haversack.parts.kv.base import KVOption
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.plan.make import make_plan
from haversack.plan.question import Question
from haversack.recipes.allocation import Allocation, AllocationSite, Choice, front
from haversack.recipes.base import all_recipes, candidate_options
from haversack.recipes.unified_layer_skipping import kept_layers

CHOOSERS = {recipe.id: recipe.choose for recipe in all_recipes().values() if recipe.choose is not None}


def question(seed: int, num_sites: int = 4, room: float = 0.5) -> Allocation:
    """Sites whose damage falls fourfold with each bit, more or less, between 2 and 8 bits."""
    draw = random.Random(seed)
    sites = []
    for i in range(num_sites):
        weights = draw.choice([4096, 8192, 16384])
        size = draw.uniform(0.1, 10) * weights * 1e-6
        choices = [
            Choice(f"{bits} bits", bits * weights // 8, size * 4.0**-bits * draw.uniform(0.8, 1.25))
            for bits in (2, 3, 4, 8)
        ]
        sites.append(AllocationSite(f"site {i}", i // 2, weights, front([*choices, Choice("as is", 2 * weights, 0.0)])))
    least = sum(site.choices[0].num_bytes for site in sites)
    most = sum(site.choices[-1].num_bytes for site in sites)
    asked = Allocation(tuple(sites), int(least + room * (most - least)), lambda chosen: 0.0, dict)

    def measured(chosen):  # neighbours in a layer make each other worse
        alone = [site.choices[i].damage for site, i in zip(asked.sites, chosen, strict=True)]
        return sum(alone) + sum((a * b) ** 0.5 for a, b in itertools.pairwise(alone))

    changes = {site.layer: draw.random() for site in sites}
    return Allocation(asked.sites, asked.capacity_bytes, measured, lambda: changes)


def best_sum(asked: Allocation) -> float:
    every = itertools.product(*(range(len(site.choices)) for site in asked.sites))
    return min(asked.damage(chosen) for chosen in every if asked.fits(chosen))


@pytest.mark.parametrize("name", CHOOSERS)
@pytest.mark.parametrize("room", [0.0, 0.1, 0.35, 0.8, 1.0])
def test_every_chooser_keeps_within_the_bytes(name, room):
    for seed in range(4):
        asked = question(seed, 6, room)
        chosen = CHOOSERS[name](asked)
        assert len(chosen) == len(asked.sites) and asked.fits(chosen)
        if room == 1.0:  # all fits: nothing may be given up
            assert asked.damage(chosen) == 0


@pytest.mark.parametrize("seed", range(8))
def test_exact_choosers_equal_brute_force(seed):
    asked = question(seed, 5, 0.3)
    least = best_sum(asked)
    assert asked.damage(CHOOSERS["adaquant"](asked)) == pytest.approx(least, rel=1e-6)
    assert asked.damage(CHOOSERS["layer-adaptive-dp-pruning"](asked)) == pytest.approx(least, rel=1e-6)


def test_closed_form_bits_lose_alike_everywhere_and_less_than_uniform_ones():
    gains = []
    for seed in range(12):
        asked = question(seed, 12, 0.1)
        chosen = CHOOSERS["baq"](asked)
        alike = [s.choices[i].damage / s.num_weights for s, i in zip(asked.sites, chosen, strict=True)]
        even = [s.choices[i].damage / s.num_weights for s, i in zip(asked.sites, asked.uniform(), strict=True)]
        assert max(alike) <= max(even) * 1.01
        gains.append(asked.damage(chosen) / asked.damage(asked.uniform()))
        assert asked.damage(chosen) <= 3 * asked.damage(CHOOSERS["adaquant"](asked))
    assert sum(gains) / len(gains) < 0.9


def test_layers_that_stay_are_spread_evenly():
    assert kept_layers(8, 8) == set(range(8)) and kept_layers(8, 1) == {0}
    for num_layers, number in itertools.product((2, 8, 33), (2, 3, 5, 7)):
        if number <= num_layers:
            kept = sorted(kept_layers(num_layers, number))
            gaps = [b - a for a, b in itertools.pairwise(kept)]
            assert len(kept) == number and (kept[0], kept[-1]) == (0, num_layers - 1)
            assert max(gaps) - min(gaps) <= 1


def test_evolution_follows_what_is_measured_of_the_whole():
    for seed in range(4):
        asked = question(seed, 10, 0.2)
        assert asked.measure(CHOOSERS["evopress"](asked)) < asked.measure(asked.uniform())


def test_layers_that_change_more_get_the_higher_level():
    asked = question(3, 12, 0.2)
    chosen = CHOOSERS["layerwisequant"](asked)
    changes = asked.layer_change()
    most, least = max(changes, key=changes.get), min(changes, key=changes.get)

    def bits(layer):
        return sum(
            8 * s.choices[i].num_bytes / s.num_weights
            for s, i in zip(asked.sites, chosen, strict=True)
            if s.layer == layer
        )

    assert bits(most) > bits(least)


def test_choosers_add_no_options_of_their_own_and_take_none_away():
    of_all = tuple(name for name in CHOOSERS if not all_recipes()[name].options())
    assert candidate_options("weights", of_all) == candidate_options("weights")
    assert len(of_all) == len(CHOOSERS) - 1 and len(candidate_options("weights", ("unified-layer-skipping",))) == 1
    assert candidate_options("weights", ("gptq", "evopress")) == candidate_options("weights", ("gptq",))


class SummingMeter:
    """Measures what the solver adds up, so that no weights are needed."""

    def measure(self, built, chosen):
        return built.problem.evaluate(chosen).damage

    def progress(self, what, done, total):
        assert done >= 0

    def judge(self, built, chosen):
        return Damage(built.problem.evaluate(chosen).damage, "measured")


def ask(budget_bytes, recipes, meter):
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256, "vocab_size": 512,
        "max_position_embeddings": 512, "dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    model = describe_model(config)
    options = [WeightOption(IntegerGrid(bits, 64), NearestRounding()) for bits in (2, 3, 4, 8)]
    damages = {
        site.id: {WeightOption(): NONE} | {o: Damage(4.0**-o.grid.bits * (1 + i % 5), "proxied") for o in options}
        for i, site in enumerate(model.weights)
    }
    caches = {site.id: {KVOption(): NONE} for site in model.attention}
    machine = Machine("test", 2, 2**33, 2**33)
    workload = ServeWorkload(24, 9)
    return make_plan(
        Question(
            model,
            workload,
            machine,
            budget_bytes,
            budget_kind="tensor",
            weight_damages=damages,
            kv_damages=caches,
            recipes=recipes,
        ),
        meter=meter,
    )


@pytest.mark.parametrize("name", ["adaquant", "baq", "evopress", "layer-adaptive-dp-pruning"])
def test_what_a_chooser_takes_becomes_an_ordinary_plan(name):
    budget = 900_000
    planned, chosen = ask(budget, (), None), ask(budget, (name,), SummingMeter())
    assert chosen.fits and chosen.plan.prediction.peak_bytes <= budget
    assert chosen.plan.recipes == (name,)
    least = planned.plan.prediction.damage.nats
    assert 0 < least <= chosen.plan.prediction.damage.nats * (1 + 1e-6)
    if name == "adaquant":  # the same program over the same bytes, workspaces apart
        assert chosen.plan.prediction.damage.nats <= 1.1 * least


def test_a_chooser_without_a_budget_or_measurements_is_refused():
    with pytest.raises(UsageError, match="evopress chooses by plans that are measured"):
        ask(900_000, ("evopress",), None)
