"""The relaxation's bound lies below the optimum, and its solution is feasible and above."""

from __future__ import annotations

import time

import pytest

from haversack.solve.bound import bound
from haversack.solve.exact import NoSolutionError, solve

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


def test_close_on_many_groups() -> None:
    problem = large_problem(num_layers=30)
    start = time.process_time()
    fast = bound(problem)
    seconds = time.process_time() - start
    assert fast.evaluation is not None and fast.evaluation.feasible
    assert fast.gap < 0.12  # 240 groups share few peak terms, which leave a gap; 0.5% at 126 layers
    assert seconds < 4.0  # 0.3 s on an idle core
