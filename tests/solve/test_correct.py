"""The correction loop against a made-up world whose damages differ from the predicted ones."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest

from haversack.errors import PlanError, UsageError
from haversack.solve.correct import correct
from haversack.solve.exact import solve
from haversack.solve.problem import Choice, Group, Problem, TimePoint

TRUE_SCALE = {"query": 0.3, "up": 1.0, "down": 4.0}


def world(seed: int = 0, num_groups: int = 18) -> tuple[Problem, Problem]:
    """(as predicted, as it is): each kind is off by its own factor and each choice by up to a fifth."""
    draw = random.Random(seed)
    predicted, real = [], []
    for g in range(num_groups):
        kind = list(TRUE_SCALE)[g % 3]
        weight, numbers = draw.uniform(0.5, 2), draw.randint(90, 110)
        choices = tuple(Choice(f"{b}", weight * 4.0**-b, 0.0, {"weights": numbers * b}) for b in (2, 3, 4, 6, 8))
        predicted.append(Group(f"g{g}", choices, kind))
        scaled = (replace(c, damage=c.damage * TRUE_SCALE[kind] * draw.uniform(0.8, 1.2)) for c in choices)
        real.append(Group(f"g{g}", tuple(scaled), kind))
    points = (TimePoint("decode", "device", ("weights",)),)
    capacity = {"device": num_groups * 100 * 4}
    return Problem(tuple(predicted), points, capacity), Problem(tuple(real), points, capacity)


@pytest.mark.parametrize("seed", range(3))
def test_closes_most_of_the_gap_within_its_evaluations(seed: int) -> None:
    predicted, real = world(seed)
    asked: list[tuple[int, ...]] = []

    def measure(chosen: tuple[int, ...]) -> float:
        asked.append(chosen)
        return real.evaluate(chosen).damage

    found = correct(predicted, measure, max_evaluations=16)
    best_possible = solve(real).objective
    first = found.trials[0].measured
    assert len(asked) == len(set(asked)) <= 16
    assert found.best.measured == min(real.evaluate(chosen).damage for chosen in asked)
    assert first - found.best.measured >= 0.6 * (first - best_possible)
    assert found.best.measured >= best_possible * (1 - 1e-6)
    assert all(predicted.evaluate(chosen).feasible for chosen in asked)


def test_never_worse_than_the_first_and_never_one_evaluation_more() -> None:
    predicted, _ = world()
    draw = random.Random(1)
    for limit in (1, 2, 5):
        values: list[float] = []

        def noise(_: tuple[int, ...], values: list[float] = values) -> float:
            values.append(draw.choice([math.nan, math.inf, draw.random()]) if values else 0.5)
            return values[-1]

        found = correct(predicted, noise, max_evaluations=limit)
        assert len(values) <= limit and found.best.measured <= 0.5


def test_resumes_as_if_never_stopped() -> None:
    predicted, real = world()

    def measure(chosen: tuple[int, ...]) -> float:
        return real.evaluate(chosen).damage

    whole = correct(predicted, measure, max_evaluations=7)
    states: list[dict] = []
    correct(predicted, measure, max_evaluations=3, record=states.append)
    calls = []
    resumed = correct(
        predicted,
        lambda chosen: calls.append(chosen) or measure(chosen),
        max_evaluations=7,
        state=json.loads(json.dumps(states[-1])),
    )
    assert [t.solution_hash for t in resumed.trials] == [t.solution_hash for t in whole.trials]
    assert len(calls) == len(whole.trials) - 3


def test_refuses_what_it_can_not_use() -> None:
    predicted, real = world()
    states: list[dict] = []
    correct(predicted, lambda _: 1.0, max_evaluations=1, record=states.append)
    with pytest.raises(PlanError, match="belongs"):
        correct(real, lambda _: 1.0, max_evaluations=2, state=states[0])
    states[0]["trials"][0]["chosen"][0] ^= 1
    with pytest.raises(PlanError, match="hash"):
        correct(predicted, lambda _: 1.0, max_evaluations=2, state=states[0])
    with pytest.raises(UsageError, match="max_evaluations"):
        correct(predicted, lambda _: 1.0, max_evaluations=0)
    vector = Problem((Group("g", (Choice("c", (1.0, 2.0)),)),))
    with pytest.raises(UsageError, match="1 figures were measured, but damages are of 2 probes"):
        correct(vector, lambda _: 1.0, max_evaluations=1)


def test_the_worst_probe_decides_and_each_is_fitted_apart() -> None:
    """Two probes whose predictions are off by other factors: the search must find what is least for the worse one."""
    predicted, real = world()

    def with_second(problem: Problem, factor: float) -> Problem:
        def both(group: Group) -> Group:
            weigh = factor if group.kind == "query" else 0.2
            return replace(group, choices=tuple(replace(c, damage=(c.damage, c.damage * weigh)) for c in group.choices))

        return replace(problem, groups=tuple(map(both, problem.groups)))

    predicted, real = with_second(predicted, 1.0), with_second(real, 9.0)

    def measure(chosen: tuple[int, ...]) -> tuple[float, ...]:
        taken = [group.choices[i].damage for group, i in zip(real.groups, chosen)]
        return tuple(map(sum, zip(*taken)))

    states: list[dict] = []
    found = correct(predicted, measure, max_evaluations=16, record=states.append)
    best_possible = solve(real).objective
    first = found.trials[0].measured
    assert found.best.measured == max(found.best.probes) == pytest.approx(real.evaluate(found.best.chosen).damage)
    assert first - found.best.measured >= 0.5 * (first - best_possible)
    again = correct(predicted, measure, max_evaluations=16, state=json.loads(json.dumps(states[-1])))
    assert again.best == found.best


def test_stops_when_everything_was_measured() -> None:
    tiny = Problem((Group("g", (Choice("a", 1.0, 0.0, {"w": 1}), Choice("b", 0.5, 0.0, {"w": 2}))),),
                   (TimePoint("t", "device", ("w",)),), {"device": 9})  # fmt: skip
    found = correct(tiny, lambda chosen: float(chosen[0]), max_evaluations=50)
    assert len(found.trials) == 2 and found.best.chosen == (0,)
