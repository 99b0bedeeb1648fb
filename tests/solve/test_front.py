from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from haversack.solve.exact import solve
from haversack.solve.front import pareto_front, uniform_baselines

from .test_scale import large_problem


def small() -> tuple:
    problem = replace(large_problem(num_layers=1, seed=3), max_seconds=None)
    capacity = problem.capacity_bytes["device"]
    return problem, [int(capacity * share) for share in (0.5, 0.7, 0.71, 0.9, 1.2, 4.0, 5.0)]


def test_every_point_is_the_optimum_at_its_budget_and_none_is_dominated() -> None:
    problem, budgets = small()
    front = pareto_front(problem, budgets)
    assert len(front) >= 3
    for smaller, larger in pairwise(front):
        assert smaller.peak_bytes < larger.peak_bytes and smaller.damage > larger.damage
    for budget in budgets:
        best = solve(replace(problem, capacity_bytes={"device": budget}))
        within = [point.damage for point in front if point.peak_bytes <= budget]
        assert (min(within) if within else None) == (best.objective if best.fits else None)


def test_relaxed_front_lies_on_or_above_the_exact_one() -> None:
    problem, budgets = small()
    exact, relaxed = pareto_front(problem, budgets), pareto_front(problem, budgets, exact=False)
    for point in relaxed:
        assert point.damage >= min(p.damage for p in exact if p.peak_bytes <= point.budget_bytes) * (1 - 1e-9)


def test_the_solver_beats_every_uniform_choice_at_equal_bytes() -> None:
    problem, _ = small()
    problem = replace(problem, capacity_bytes={})
    ids = [f"o{i}" for i in range(0, 24, 3)]
    for chosen, taken in uniform_baselines(problem, [0] * len(problem.groups), ids).values():
        assert problem.evaluate(chosen) == taken
        ours = solve(replace(problem, capacity_bytes=taken.peak_bytes), tie_break=False)
        assert ours.fits and ours.objective <= taken.damage * (1 + 1e-9)
