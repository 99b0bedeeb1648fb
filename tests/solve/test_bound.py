"""The relaxation's bound lies below the optimum, and its solution is feasible and above."""

from __future__ import annotations

import time

import pytest

from haversack.solve.bound import bound
from haversack.solve.exact import NoSolutionError, solve
from haversack.solve.problem import Choice, Group, PeakTerm, Problem, TimePoint

from .test_exact import random_problem
from .test_scale import large_problem


@pytest.mark.parametrize("minimise", ["damage", "seconds", "bytes"])
def test_bound_optimum_greedy_stand_in_order(minimise: str) -> None:
    found = feasible = 0
    for seed in range(1000, 1050):
        problem = random_problem(seed)
        try:
            best = solve(problem, minimise, tie_break=False)
        except NoSolutionError:
            assert bound(problem, minimise, num_steps=30).chosen is None
            continue
        fast = bound(problem, minimise, num_steps=30)
        if not best.fits:
            assert fast.chosen is None
            continue
        feasible += 1
        assert fast.lower_bound <= best.objective + 1e-7 * max(1.0, abs(best.objective))
        if fast.chosen is not None:
            found += 1
            assert problem.evaluate(fast.chosen).feasible
            assert fast.objective >= best.objective - 1e-7 * max(1.0, abs(best.objective))
    assert feasible >= 25
    print(found, feasible)
    assert found >= 0.8 * feasible  # these are tight on purpose: capacities are one solution's bytes, to the byte


def test_choices_that_cost_nothing_and_share_a_workspace_do_not_chase_each_other() -> None:
    """Leaving a choice seems to free its workspace, of which another group needs nearly as much."""

    def group(name: str, *choices: dict[str, int]) -> Group:
        return Group(name, tuple(Choice(f"c{i}", account_bytes=held) for i, held in enumerate(choices)))

    groups = (
        group("a", {"held": 100, "workspace.a": 300}, {"held": 167, "workspace.a": 85}),
        group("b", {"held": 10, "workspace.b": 166}),
        group("c", {"held": 50}, {"held": 45, "workspace.c": 1}),
    )
    point = TimePoint("decode", "device", ("held",), (PeakTerm(("workspace.a", "workspace.b", "workspace.c")),))
    for capacity in (460, 393, 390):
        found = bound(Problem(groups, (point,), {"device": capacity}))
        assert found.evaluation is not None and found.evaluation.feasible, capacity


def test_close_on_many_groups() -> None:
    problem = large_problem(num_layers=30)
    start = time.process_time()
    fast = bound(problem)
    seconds = time.process_time() - start
    assert fast.evaluation is not None and fast.evaluation.feasible
    assert fast.gap < 0.12  # 240 groups share few peak terms, which leave a gap; 0.5% at 126 layers
    assert seconds < 4.0  # 0.3 s on an idle core
