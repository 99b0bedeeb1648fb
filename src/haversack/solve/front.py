"""Damage against bytes: the front of best solutions over budgets, and the uniform choices it must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from haversack.solve.bound import bound
from haversack.solve.exact import Solution, solve
from haversack.solve.problem import Evaluation, Problem


@dataclass(frozen=True)
class FrontPoint:
    """The best solution at a budget. `peak_bytes` are what it really takes of the tier, at most the budget."""

    budget_bytes: int
    chosen: tuple[int, ...]
    damage: float
    lower_bound: float
    seconds: float
    peak_bytes: int


def pareto_front(
    problem: Problem,
    budgets_bytes: Sequence[int],
    *,
    tier: str | None = None,
    exact: bool = True,
    time_limit_seconds: float | None = None,
) -> list[FrontPoint]:
    """Damage against bytes of `tier` (the first), fewest bytes first; no point has another with no more of both.

    Budgets that nothing fits give no point. From the largest budget down: a solution that takes fewer bytes than
    asked stays the best for every budget down to its own bytes, so those cost no solve. `exact=False` uses the
    relaxation, in milliseconds per budget. `time_limit_seconds` is per budget.
    """
    tier = tier or problem.tiers[0]
    points: list[FrontPoint] = []
    for budget in sorted(set(budgets_bytes), reverse=True):
        if points and points[-1].peak_bytes <= budget:
            continue
        at_budget = replace(problem, capacity_bytes={**problem.capacity_bytes, tier: budget})
        point = _solved(at_budget, tier, time_limit_seconds) if exact else _relaxed(at_budget, tier)
        if point is None:
            break  # nothing fits, nor will it in less
        points.append(point)
    return undominated_points(points)


def undominated_points(points: Sequence[FrontPoint]) -> list[FrontPoint]:
    """Sorted by bytes; a point stays where its damage is below that of every smaller one."""
    front: list[FrontPoint] = []
    for point in sorted(points, key=lambda p: (p.peak_bytes, p.damage)):
        if not front or point.damage < front[-1].damage:
            front.append(point)
    return front


def uniform(problem: Problem, choice_id: str, otherwise: Sequence[int]) -> tuple[int, ...]:
    """Every group that has a choice of this id takes it; the others keep `otherwise` (one index per group)."""
    indices = [group.index(choice_id) for group in problem.groups]
    return tuple(kept if index is None else index for index, kept in zip(indices, otherwise, strict=True))


def uniform_baselines(
    problem: Problem, otherwise: Sequence[int], choice_ids: Sequence[str] | None = None
) -> dict[str, tuple[tuple[int, ...], Evaluation]]:
    """Choice id -> the uniform solution and what it takes, for all ids that occur (or those named)."""
    ids = choice_ids or list(dict.fromkeys(choice.id for group in problem.groups for choice in group.choices))
    solutions = {choice_id: uniform(problem, choice_id, otherwise) for choice_id in ids}
    return {choice_id: (chosen, problem.evaluate(chosen)) for choice_id, chosen in solutions.items()}


def _solved(problem: Problem, tier: str, time_limit_seconds: float | None) -> FrontPoint | None:
    solution: Solution = solve(problem, time_limit_seconds=time_limit_seconds)
    return _point(problem, tier, solution.chosen, solution.lower_bound) if solution.fits else None


def _relaxed(problem: Problem, tier: str) -> FrontPoint | None:
    answer = bound(problem)
    return None if answer.chosen is None else _point(problem, tier, answer.chosen, answer.lower_bound)


def _point(problem: Problem, tier: str, chosen: tuple[int, ...], lower_bound: float) -> FrontPoint:
    taken = problem.evaluate(chosen)
    return FrontPoint(
        budget_bytes=problem.capacity_bytes[tier],
        chosen=chosen,
        damage=taken.damage,
        lower_bound=lower_bound,
        seconds=taken.seconds,
        peak_bytes=taken.peak_bytes[tier],
    )
