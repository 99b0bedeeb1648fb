"""The best solution, with proof: integer programming by HiGHS, gap zero asked and the gap reached stated.

Ties are broken in order, each by a solve of its own that holds what was reached before: damage, then seconds, then
bytes (for the question `seconds`: seconds, damage, bytes; for `bytes`: bytes, damage, seconds).

Bytes are exact: a solution that HiGHS's tolerances let through although it passes a capacity by a byte is excluded and
the program solved again. If nothing fits, the answer is the solution with the fewest bytes over the capacities, and
says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from haversack.errors import HaversackError
from haversack.solve.arrays import Arrays, to_arrays
from haversack.solve.bound import NUM_STEPS, Prices, Relaxation
from haversack.solve.problem import BOUND_TOLERANCE, Evaluation, Problem
from haversack.solve.program import Answer, Goal, Program

Minimise = Literal["damage", "seconds", "bytes"]

MAX_REPAIRS = 50
"""Solutions excluded because they miss a capacity by a tolerance, before the search gives up. None was ever needed in
the tests' thousands of programs."""

REDUCTION_TOLERANCE = 1e-7
"""Relative: a choice is dropped only if its bound passes the greedy value by more than sums of floats can be off."""

SMALL_ENOUGH = 100
"""Choices below which HiGHS is faster than reducing first."""


class NoSolutionError(HaversackError):
    """Links or bounds on damage and seconds can't be met at any budget; the message says which."""


class SolverTimeoutError(HaversackError):
    """The time limit passed before any feasible solution was found."""


@dataclass(frozen=True)
class Solution:
    """One choice index per group, and what is known about it.

    `objective` is in nats, seconds or bytes; `lower_bound` is proven for every feasible solution of the question;
    `gap` = (objective - lower_bound) / |objective|, 0 for a proven optimum. `fits` is False where the problem has no
    feasible solution: then this one has the fewest bytes over the capacities (`evaluation.excess_bytes`), objective and
    bound are these bytes, and ties were broken by damage, then seconds.
    """

    chosen: tuple[int, ...]
    minimised: Minimise
    objective: float
    lower_bound: float
    fits: bool
    evaluation: Evaluation
    seconds_to_solve: float
    method: str = "integer program"

    @property
    def gap(self) -> float:
        return max(0.0, self.objective - self.lower_bound) / max(1e-12, abs(self.objective))


def solve(
    problem: Problem,
    minimise: Minimise = "damage",
    *,
    tier: str | None = None,
    time_limit_seconds: float | None = None,
    tie_break: bool = True,
    far: Iterable[tuple[Sequence[int], int]] = (),
    near: tuple[Sequence[int], int] | None = None,
) -> Solution:
    """The solution with the least damage, seconds, or peak bytes of `tier` (the problem's first), within all budgets.

    `far`: (solution, n) pairs, at least n groups must differ (n = 1 forbids just that solution); `near`: at most n
    groups may differ. Raises NoSolutionError, SolverTimeoutError.
    """
    return Solver(problem, far=far, near=near).solve(
        minimise, tier=tier, time_limit_seconds=time_limit_seconds, tie_break=tie_break
    )


class Solver:
    """One problem's program, kept for several questions."""

    def __init__(
        self,
        problem: Problem,
        *,
        far: Iterable[tuple[Sequence[int], int]] = (),
        near: tuple[Sequence[int], int] | None = None,
    ):
        self.problem = problem
        self._far = [(tuple(chosen), num) for chosen, num in far]
        self._near = near
        given = [chosen for chosen, _ in self._far] + ([near[0]] if near else [])
        self.arrays: Arrays = to_arrays(problem, never_dominated=given)
        self._merge = not given
        self._program = Program(self.arrays, merge=self._merge)
        self._gap = 0.0

    @property
    def num_choices(self) -> int:
        """What the program decides about: choices that nothing dominates, those of equal groups once."""
        return self._program.arrays.num_choices

    def solve(
        self,
        minimise: Minimise = "damage",
        *,
        tier: str | None = None,
        time_limit_seconds: float | None = None,
        tie_break: bool = True,
        gap: float = 0.0,
    ) -> Solution:
        """As the function `solve`; with `gap`, a solution proven to be within this share of the best is good enough."""
        self._gap = gap
        start = time.monotonic()
        deadline = None if time_limit_seconds is None else start + time_limit_seconds
        tiers = self.problem.tiers
        smallest = Goal({f"peak:{tier or tiers[0]}": 1.0} if tiers else {})
        all_bytes = Goal({f"peak:{name}": 1.0 for name in tiers})
        damage, seconds = Goal({"damage": 1.0}), Goal({"seconds": 1.0})
        order = {
            "damage": [damage, seconds, all_bytes],
            "seconds": [seconds, damage, all_bytes],
            "bytes": [smallest, damage, seconds],
        }[minimise]
        arrays, program = self.arrays, self._program  # each question starts from the whole, and may drop choices
        found = self._in_order(order if tie_break else order[:1], {}, deadline)
        self.arrays, self._program = arrays, program
        fits = found is not None
        if found is None:
            limited = [name for name in tiers if name in self.problem.capacity_bytes]
            # over the capacity of the only limited tier: the same as its smallest peak, which reduces better
            kind = "excess" if len(limited) > 1 else "peak"
            excess = Goal({f"{kind}:{name}": 1.0 for name in limited})
            order = [excess, damage, seconds]
            allowed = dict.fromkeys(excess.weights, np.inf)
            found = self._in_order(order if tie_break else order[:1], allowed, deadline)
            if found is None:
                raise NoSolutionError(self._why())
            self.arrays, self._program = arrays, program
        chosen, bound = found
        evaluation = self.problem.evaluate(chosen)
        objective = sum(_value(name, evaluation) for name in order[0].weights)
        if not fits and kind == "peak":
            objective, bound = sum(evaluation.excess_bytes.values()), bound - self.problem.capacity_bytes[limited[0]]
        if minimise == "bytes" or not fits:  # whole bytes: the bound may be rounded up, less what HiGHS tolerates
            bound = max(0, math.ceil(bound - self._program.tolerance(order[0])))
        return Solution(
            chosen=chosen,
            minimised=minimise,
            objective=objective,
            lower_bound=min(bound, objective),
            fits=fits,
            evaluation=evaluation,
            seconds_to_solve=time.monotonic() - start,
        )

    def _in_order(
        self, goals: Sequence[Goal], allowed: dict[str, float], deadline: float | None
    ) -> tuple[tuple[int, ...], float] | None:
        """Chosen indices and the proven bound of the first goal; None where nothing is feasible.

        A later goal that finds nothing (its time is up, or the tolerance of the value held ate the last solution)
        leaves what the goals before it found.
        """
        limits = dict(allowed)
        best: tuple[tuple[int, ...], float] | None = None
        for goal in goals:
            if not goal.weights:
                continue
            if best is not None and deadline is not None and time.monotonic() >= deadline:
                return best
            answer = self._exactly(goal, limits, deadline)
            if answer is None or answer.flat is None:
                if best is None and answer is not None:
                    raise SolverTimeoutError("the time limit passed before any feasible solution was found.")
                return best
            chosen = self.arrays.chosen(answer.flat)
            best = (chosen, answer.bound if best is None else best[1])
            evaluation = self.problem.evaluate(chosen)
            held = {name: _value(name, evaluation) for name in goal.weights}
            if goal is not goals[-1]:
                self._drop_beyond(goal, limits, chosen, deadline)
            limits.update(held)
        return best

    def _drop_beyond(
        self, goal: Goal, limits: dict[str, float], chosen: tuple[int, ...], deadline: float | None
    ) -> None:
        """Drops choices that no solution as good as this one can hold, before ties are broken: they would be searched for nothing.
        Twelve kinds of experts in 36 layers took 17 s to choose the fastest of the least damaged, and take .02."""
        if any(name.startswith("excess") for name in (*goal.weights, *limits)):
            return
        upper = self._with_slack(limits)
        left = None if deadline is None else deadline - time.monotonic()
        from_dual = self._program.prices(goal, upper=upper, time_limit_seconds=left)
        if from_dual is None:
            return
        relaxation = Relaxation(self.arrays, goal.weights, upper)
        prices = relaxation.legal(from_dual)
        cost = relaxation.cost(prices)
        flat = self.arrays.flat(chosen)
        value = sum(w * _value(name, self.problem.evaluate(chosen)) for name, w in goal.weights.items())
        self._keep_within(value + sum(_slack(name, value) for name in goal.weights), relaxation, prices, cost, flat)

    def _exactly(self, goal: Goal, limits: dict[str, float], deadline: float | None) -> Answer | None:
        """HiGHS's answer, solved again without solutions that only its tolerances allow; None where infeasible.

        First a price for every budget, a bound and a solution from the relaxation: a choice that costs more than the
        difference can't be in any better solution and is dropped for this goal and, as its value is held, for the next.
        """
        upper = self._with_slack(limits)
        plain = self.num_choices > SMALL_ENOUGH and not any(
            name.startswith("excess") for name in (*goal.weights, *upper)
        )
        left = None if deadline is None else deadline - time.monotonic()
        greedy = self._reduce(goal, upper, left) if plain else None
        if greedy is not None and self._worth(greedy, goal) - greedy.bound <= self._gap * abs(greedy.bound):
            return greedy
        program = self._program
        presolve = self.num_choices > SMALL_ENOUGH
        forbidden = list(self._far)
        for _ in range(MAX_REPAIRS):
            left = None if deadline is None else deadline - time.monotonic()
            answer = program.solve(
                goal,
                upper=upper,
                far=forbidden,
                near=self._near,
                time_limit_seconds=left,
                presolve=presolve,
                gap=self._gap,
            )
            if presolve and greedy is not None and self._contradicts(answer, greedy, goal):
                presolve = False
                continue
            if answer.infeasible:
                return None
            if answer.flat is None:
                if not answer.timed_out:
                    raise HaversackError("HiGHS ended without an answer and without saying that there is none.")
                return answer if greedy is None else greedy
            if (answer.timed_out or self._gap) and greedy is not None and self._beats(greedy, answer, goal):
                return Answer(greedy.flat, max(greedy.bound, answer.bound), infeasible=False, timed_out=True)
            chosen = self.arrays.chosen(answer.flat)
            if self._keeps(self.problem.evaluate(chosen), limits):
                return answer
            if program.is_merged:  # a count can't be forbidden without what is better than it in another order
                program = Program(self.arrays, merge=False)
                presolve = self.arrays.num_choices > SMALL_ENOUGH
            forbidden.append((chosen, 1))
        raise HaversackError(f"{MAX_REPAIRS} solutions in a row passed a limit by no more than the solver's tolerance.")

    def _reduce(self, goal: Goal, upper: dict[str, float], left: float | None) -> Answer | None:
        """Drops choices that can't be in a solution better than the greedy one, which is returned, if there is one."""
        relaxation = Relaxation(self.arrays, goal.weights, upper)
        ascended, _ = relaxation.ascend(NUM_STEPS)
        from_dual = self._program.prices(goal, upper=upper, time_limit_seconds=left)
        candidates = [ascended] if from_dual is None else [relaxation.legal(from_dual), ascended]
        costs = [relaxation.cost(prices) for prices in candidates]
        bounds = [relaxation.lower_bound(p, c, relaxation.cheapest(c)) for p, c in zip(candidates, costs, strict=True)]
        solutions = [flat for flat in map(relaxation.repaired, candidates) if flat is not None]
        solutions = [flat for flat in solutions if self._at_distance(self.arrays.chosen(flat))]
        if not solutions:
            return None
        flat = min(solutions, key=relaxation.objective)
        best = int(np.argmax(bounds))
        chosen = self.arrays.chosen(flat)
        self._keep_within(relaxation.objective(flat), relaxation, candidates[best], costs[best], flat)
        return Answer(self.arrays.flat(chosen), bounds[best], infeasible=False, timed_out=True)

    def _keep_within(
        self, value: float, relaxation: Relaxation, prices: Prices, cost: np.ndarray, flat: np.ndarray
    ) -> None:
        """Keeps the choices that a solution of at most this value can hold, and those of `flat` (one position per group). `cost`
        is what choices cost at these prices."""
        cheapest = relaxation.cheapest(cost)
        lower = relaxation.lower_bound(prices, cost, cheapest)
        loss = cost - cost[cheapest][self.arrays.group_of]
        keep = lower + loss <= value + REDUCTION_TOLERANCE * max(1e-12, abs(value), abs(lower))
        keep[flat] = True
        self._program.classes.keep_alike(keep, self.arrays.starts)
        if not keep.all():
            self.arrays = self.arrays.restricted(keep)
            self._program = Program(self.arrays, merge=self._merge)

    @staticmethod
    def _with_slack(limits: dict[str, float]) -> dict[str, float]:
        return {name: value + _slack(name, value) for name, value in limits.items()}

    def _contradicts(self, answer: Answer, greedy: Answer, goal: Goal) -> bool:
        """HiGHS says it is done and has nothing, or nothing as good as a solution that is known."""
        worse = answer.flat is not None and not self._gap and self._beats(greedy, answer, goal)
        return not answer.timed_out and (answer.flat is None or worse)

    def _beats(self, greedy: Answer, answer: Answer, goal: Goal) -> bool:
        ours, theirs = self._worth(greedy, goal), self._worth(answer, goal)
        return ours < theirs - REDUCTION_TOLERANCE * max(1e-12, abs(ours))

    def _worth(self, answer: Answer, goal: Goal) -> float:
        assert answer.flat is not None
        evaluation = self.problem.evaluate(self.arrays.chosen(answer.flat))
        return sum(weight * _value(name, evaluation) for name, weight in goal.weights.items())

    def _at_distance(self, chosen: Sequence[int]) -> bool:
        differ = [sum(a != b for a, b in zip(chosen, other, strict=True)) >= num for other, num in self._far]
        near = self._near is None or sum(a != b for a, b in zip(chosen, self._near[0], strict=True)) <= self._near[1]
        return all(differ) and near

    def _keeps(self, evaluation: Evaluation, limits: dict[str, float]) -> bool:
        over = any(
            limits.get(f"excess:{name}", 0.0) < num and f"peak:{name}" not in limits
            for name, num in evaluation.excess_bytes.items()
        )
        held = all(_value(name, evaluation) <= value + 2 * _slack(name, value) for name, value in limits.items())
        return evaluation.within_bounds and not evaluation.broken_links and not over and held

    def _why(self) -> str:
        """Which links or bounds can't be met, however many bytes there are."""
        free = {f"excess:{name}": np.inf for name in self.problem.tiers}
        unbounded = {**free, "damage": np.inf, "seconds": np.inf}
        if self._program.solve(Goal({}), upper=unbounded, far=self._far, near=self._near).flat is None:
            return "the links (and forbidden solutions) leave no way to take one choice in every group."
        for name, bound in (("seconds", self.problem.max_seconds), ("damage", self.problem.max_damage)):
            if bound is None:
                continue
            answer = self._program.solve(Goal({name: 1.0}), upper=unbounded, far=self._far, near=self._near)
            if answer.flat is not None:
                least = _value(name, self.problem.evaluate(self.arrays.chosen(answer.flat)))
                if least > bound:
                    return (
                        f"{name} of at most {bound:g} were asked, but the least possible is {least:g}; allow that much."
                    )
        return "the bounds on seconds and on damage can each be met, but not both at once; loosen one of them."


def _value(name: str, evaluation: Evaluation) -> float:
    """A named value of `Program`, counted exactly."""
    if name == "damage":
        return evaluation.damage
    if name == "seconds":
        return evaluation.seconds
    kind, tier = name.split(":", 1)
    return (evaluation.peak_bytes if kind == "peak" else evaluation.excess_bytes).get(tier, 0)


def _slack(name: str, value: float) -> float:
    """What a value that is held may differ by: float sums by their rounding, bytes by nothing."""
    return BOUND_TOLERANCE * abs(value) if name in ("damage", "seconds") and np.isfinite(value) else 0.0
