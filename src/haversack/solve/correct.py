"""Measured damages of whole solutions correct the predicted ones, and the search goes on from there.

Predicted damages add up over groups; real ones don't quite. Each measurement of a whole solution is one equation, far
too few to fit every choice, so the errors get a prior and the fit is its posterior mean: the true damage of choice c in
group g is taken as

    d[g, c] * (1 + a + b[kind of g] + e[g] + f[g, c]),   a, b, e, f independent, normal, of mean 0, variances below

(a linear Gaussian model; Rasmussen and Williams 2006, section 2.1). A measured total of a solution x is the sum over g
of that at x[g], plus noise, so the fit needs one solve with as many unknowns as there are measurements. Damages of several
probes are fitted apart; a solution is as good as its worst probe.

Then the problem is solved again with the fitted damages, within a trust region around the best measured solution (at
most `radius` groups change; doubled after a success, halved after a failure), without solutions already measured. Every
other step takes damages drawn from the posterior instead, and the first radius (Thompson sampling), so that what was
given up too early is measured again. Everything that decides the next step follows from the list of trials, which is
therefore all that is saved.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from haversack.errors import PlanError, UsageError
from haversack.solve.exact import NoSolutionError, SolverTimeoutError, solve
from haversack.solve.problem import Problem, as_tuple

SHARED_VARIANCE, KIND_VARIANCE, GROUP_VARIANCE, CHOICE_VARIANCE = 1.0, 1.0, 0.1, 0.05
"""Prior variances of the relative errors a, b, e and f: proxies are often off by a common factor and by role, less so
one site against its like. A choice of ours; measured solutions soon outweigh it."""

EXPLORE_EVERY = 2
"""Every second step follows a draw, the others the mean."""

SMALLEST_FACTOR = 0.05
"""A fitted damage is at least this share of the given one: a proxy may be wrong, but not in sign."""

NOISE = 0.01
"""Relative standard deviation taken for a measured damage."""


@dataclass(frozen=True)
class Trial:
    """One measured solution, by its worst probe. `predicted` by the damages given, `fitted` by those corrected before it was
    measured; `probes` is what each probe measured."""

    solution_hash: str
    chosen: tuple[int, ...]
    predicted: float
    fitted: float
    measured: float
    probes: tuple[float, ...] = ()


@dataclass(frozen=True)
class Corrected:
    """The best measured trial, all trials in order, and the problem with its damages fitted to them."""

    best: Trial
    trials: tuple[Trial, ...]
    fitted_problem: Problem


def correct(
    problem: Problem,
    measure: Callable[[tuple[int, ...]], float | tuple[float, ...]],
    *,
    max_evaluations: int,
    start: Sequence[int] | None = None,
    state: dict[str, Any] | None = None,
    record: Callable[[dict[str, Any]], None] | None = None,
    first_radius: int | None = None,
    time_limit_seconds: float | None = None,
) -> Corrected:
    """Searches for the solution with the least measured damage, in at most `max_evaluations` calls of `measure`.

    `measure` takes one index per group and returns nats per token, of each probe where damages are tuples; infinity or NaN
    says that the solution failed.
    `start` is measured first (the solver's answer if None); what is returned is never worse. `state` resumes what
    `record` was handed after every measurement (a dict for JSON); evaluations in it count. `first_radius` groups may
    change at first, half of them if None. `time_limit_seconds` is for each solve. Stops early when nothing new is
    left within reach. Raises UsageError for as many figures as there are no probes, PlanError for a state of another problem,
    NoSolutionError if nothing fits.
    """
    if max_evaluations < 1:
        raise UsageError(f"max_evaluations is {max_evaluations}, but at least one solution must be measured.")
    model = _DamageModel(problem)
    fingerprint = _fingerprint(problem)
    trials = _loaded(problem, fingerprint, state) if state else []
    radius = first_radius or max(1, len(problem.groups) // 2)
    while len(trials) < max_evaluations:
        fitted = model.fitted(trials)
        if trials:
            explore = len(trials) % EXPLORE_EVERY == 0
            guess = model.drawn(trials) if explore else fitted
            reach = radius if explore else _radius(trials, radius, len(problem.groups))
            chosen = _next(model.replaced(guess), trials, reach, time_limit_seconds)
        else:
            chosen = tuple(start) if start is not None else _first(problem, time_limit_seconds)
        if chosen is None:
            break
        probes = tuple(float(x) for x in as_tuple(measure(chosen)))
        if len(probes) != len(model.damage):
            raise UsageError(
                f"{len(probes)} figures were measured, but damages are of {len(model.damage)} probes; measure each of them."
            )
        measured = max(probes) if all(map(math.isfinite, probes)) else math.inf
        trials.append(
            Trial(
                solution_hash=solution_hash(problem, chosen),
                chosen=chosen,
                predicted=model.total(model.damage, chosen),
                fitted=model.total(fitted, chosen),
                measured=measured,
                probes=probes if math.isfinite(measured) else (),
            )
        )
        if record is not None:
            record(_saved(fingerprint, trials))
    return Corrected(min(trials, key=lambda t: t.measured), tuple(trials), model.replaced(model.fitted(trials)))


def solution_hash(problem: Problem, chosen: Sequence[int]) -> str:
    """16 hex digits of the SHA-256 of group id -> choice id."""
    return hashlib.sha256(json.dumps(problem.describe(chosen), sort_keys=True).encode()).hexdigest()[:16]


class _DamageModel:
    """Posterior mean of every choice's damage given the trials."""

    def __init__(self, problem: Problem):
        self.problem = problem
        rows = [as_tuple(choice.damage) for group in problem.groups for choice in group.choices]
        self.damage = np.zeros(
            (max(map(len, rows)), len(rows))
        )  # (probes, choices); a shorter row counts as 0 beyond its end
        for i, row in enumerate(rows):
            self.damage[: len(row), i] = row
        self.starts = np.cumsum([0] + [len(group.choices) for group in problem.groups])
        self.group_of = np.repeat(np.arange(len(problem.groups)), np.diff(self.starts))
        kinds = {kind: i for i, kind in enumerate(dict.fromkeys(group.kind for group in problem.groups))}
        self.kind_of = np.array([kinds[group.kind] for group in problem.groups], dtype=np.int64)
        self.num_kinds = len(kinds)

    def total(self, damage: np.ndarray, chosen: Sequence[int]) -> float:
        return float(damage[:, self.starts[:-1] + np.asarray(chosen)].sum(1).max())

    def fitted(self, trials: Sequence[Trial]) -> np.ndarray:
        """(num_probes, num_choices) damages; as given before any trial. A damage never changes its sign."""
        return self._corrected(trials, None)

    def drawn(self, trials: Sequence[Trial]) -> np.ndarray:
        """(num_probes, num_choices) damages drawn from the posterior; the same for the same number of trials."""
        return self._corrected(trials, np.random.default_rng(len(trials)))

    def _corrected(self, trials: Sequence[Trial], draw: np.random.Generator | None) -> np.ndarray:
        trials = [trial for trial in trials if math.isfinite(trial.measured)]
        measured = np.array([trial.probes for trial in trials]).reshape(len(trials), len(self.damage))
        taken = (
            self.starts[:-1] + np.array([trial.chosen for trial in trials]) if trials else np.empty((0, 0), np.int64)
        )
        factors = [1.0 + self._errors(row, taken, measured[:, k], draw) for k, row in enumerate(self.damage)]
        return self.damage * np.maximum(factors, SMALLEST_FACTOR)

    def _errors(
        self, damage: np.ndarray, taken: np.ndarray, measured: np.ndarray, draw: np.random.Generator | None
    ) -> np.ndarray:
        """(num_choices,) posterior mean of one probe's relative errors, or with `draw` a draw from the posterior.

        `damage` are the probe's; `taken` (trials, groups) are places in it, `measured` the totals found. By Matheron's rule: a
        draw from the prior, moved by what it says wrongly about the measured totals.
        """
        prior = np.zeros(len(damage))
        if draw is not None:
            of_kind = draw.normal(0, KIND_VARIANCE**0.5, self.num_kinds)
            of_group = draw.normal(0, GROUP_VARIANCE**0.5, len(self.kind_of)) + of_kind[self.kind_of]
            prior = draw.normal(0, CHOICE_VARIANCE**0.5, len(damage)) + of_group[self.group_of]
            prior = prior + draw.normal(0, SHARED_VARIANCE**0.5)
        if not len(taken):
            return prior
        by_group = damage[taken]
        by_kind = np.zeros((len(taken), self.num_kinds))
        by_choice = np.zeros((len(taken), len(damage)))
        for i, row in enumerate(by_group):
            np.add.at(by_kind[i], self.kind_of, row)
            by_choice[i, taken[i]] = row
        totals = by_group.sum(axis=1)
        # covariance of every choice's relative error with every measured total: (trials, choices)
        covariance = SHARED_VARIANCE * totals[:, None] + KIND_VARIANCE * by_kind[:, self.kind_of[self.group_of]]
        covariance = covariance + GROUP_VARIANCE * by_group[:, self.group_of] + CHOICE_VARIANCE * by_choice
        noise = NOISE**2 * np.maximum(measured**2, totals**2) + 1e-18
        of_totals = covariance @ by_choice.T + np.diag(noise)
        wrong = measured - totals - by_choice @ prior
        if draw is not None:
            wrong = wrong - draw.normal(0, noise**0.5)
        return prior + covariance.T @ np.linalg.solve(of_totals, wrong)

    def replaced(self, damage: np.ndarray) -> Problem:
        """The problem with these damages and, since they are no longer the ones it was set for, no bound on them."""
        rows = damage.T.tolist()
        values = iter([row[0] if len(row) == 1 else tuple(row) for row in rows])
        groups = tuple(
            replace(group, choices=tuple(replace(choice, damage=next(values)) for choice in group.choices))
            for group in self.problem.groups
        )
        return replace(self.problem, groups=groups, max_damage=None)


def _first(problem: Problem, time_limit_seconds: float | None) -> tuple[int, ...]:
    solution = solve(problem, time_limit_seconds=time_limit_seconds)
    if not solution.fits:
        raise NoSolutionError(f"nothing fits: the best is over by {solution.evaluation.excess_bytes} bytes.")
    return solution.chosen


def _next(
    problem: Problem, trials: Sequence[Trial], radius: int, time_limit_seconds: float | None
) -> tuple[int, ...] | None:
    """The best solution not measured yet, at most `radius` groups from the best measured, or from anywhere."""
    best = min(trials, key=lambda t: t.measured)
    far = [(trial.chosen, 1) for trial in trials]
    while True:
        try:
            solution = solve(
                problem, time_limit_seconds=time_limit_seconds, tie_break=False, far=far, near=(best.chosen, radius)
            )
            if solution.fits:
                return solution.chosen
        except (NoSolutionError, SolverTimeoutError):
            pass
        if radius >= len(problem.groups):
            return None
        radius = min(len(problem.groups), radius * 4)


def _radius(trials: Sequence[Trial], radius: int, num_groups: int) -> int:
    """Doubled after every trial that was the best so far, halved after every other."""
    best = trials[0].measured
    for trial in trials[1:]:
        radius = min(num_groups, radius * 2) if trial.measured < best else max(1, radius // 2)
        best = min(best, trial.measured)
    return radius


def _fingerprint(problem: Problem) -> str:
    rows = [[group.id, group.kind, [[c.id, c.damage] for c in group.choices]] for group in problem.groups]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _saved(fingerprint: str, trials: Sequence[Trial]) -> dict[str, Any]:
    rows = [{**asdict(t), "measured": t.measured if math.isfinite(t.measured) else None} for t in trials]
    return {
        "problem": fingerprint,
        "trials": [{**row, "chosen": list(row["chosen"]), "probes": list(row["probes"])} for row in rows],
    }


def _loaded(problem: Problem, fingerprint: str, state: dict[str, Any]) -> list[Trial]:
    if state.get("problem") != fingerprint:
        raise PlanError(
            f"the saved search belongs to problem {state.get('problem')}, not to {fingerprint}; start anew."
        )
    trials = []
    for row in state["trials"]:
        chosen = tuple(row["chosen"])
        measured = math.inf if row["measured"] is None else row["measured"]
        probes = tuple(row.get("probes") or ((measured,) if math.isfinite(measured) else ()))
        trials.append(Trial(**{**row, "chosen": chosen, "measured": measured, "probes": probes}))
        if solution_hash(problem, chosen) != row["solution_hash"]:
            raise PlanError(f"trial {len(trials)} of the saved search doesn't match its hash; the file was changed.")
    return trials
