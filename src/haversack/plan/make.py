"""From a question to an answer: cost every option, solve, measure whole plans, and have it written down."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from haversack.cost.candidates import Serving, kv_candidates, weight_candidates
from haversack.cost.damage import Damage
from haversack.cost.damages import damage_table, unknown_kv_damages
from haversack.cost.dropped import with_nothing
from haversack.cost.lossless import without_loss
from haversack.cost.serving import ServingProblem, serving_problem
from haversack.describe.model import paused_collection
from haversack.describe.workload import check_positions
from haversack.engine.decoder.forecast import forecast_step
from haversack.engine.profile import profile_forward
from haversack.errors import UnsupportedModelError, UsageError
from haversack.parts.kv.base import KVOption
from haversack.parts.placement.base import Placement
from haversack.parts.placement.mapped import Mapped
from haversack.parts.placement.resident import Resident
from haversack.parts.placement.streamed import Streamed
from haversack.parts.weights.base import WeightOption
from haversack.plan.question import Answer, Question
from haversack.plan.write import write_answer
from haversack.recipes.base import all_recipes, any_named, candidate_options
from haversack.solve.bound import bound
from haversack.solve.exact import NoSolutionError, Solution, Solver
from haversack.solve.front import FrontPoint, pareto_front, undominated_points, uniform_baselines
from haversack.solve.problem import Problem, as_tuple

if TYPE_CHECKING:
    from haversack.plan.refine import PlanMeter, Refined

PREFILL_CHUNKS = (512, 128, 32)
"""Chunks tried in this order; a smaller one is taken only where it saves damage or makes a plan fit."""

EXACT_SECONDS = 60.0
"""Limit of the integer program; the gap it reached by then is in the plan."""

CITED_GAP = 1e-3
"""Where damages are only cited, a solution proven to be this close to the best ends the search: what was published of other models is
not known to a thousandth. The rest of the proof took 25 s of 26 on a model of 128 experts in 36 layers."""

EXACT_CHOICES = 1500
"""Up to so many choices, equal groups counted once, the integer program takes at most a second."""

FRONT_POINTS = 16
"""Of the drawn front, at budgets that grow by equal factors: what is worth seeing lies among the small ones."""


def make_plan(
    question: Question, progress: Callable[[str, int, int], None] | None = None, meter: PlanMeter | None = None
) -> Answer:
    """Answer a question; with `meter`, whole plans are measured and the search corrected.

    Raises UsageError if the context is beyond the model's positions, and UnsupportedModelError for a model whose cache no
    option can hold.
    """
    check_positions(question.workload, question.model.max_positions, question.model.name)
    if question.model.cache_problem:
        raise UnsupportedModelError(
            f"{question.model.name} ({question.model.model_type}) can't be served from a planned cache: "
            f"{question.model.cache_problem}; leave it to transformers."
        )
    for site in question.model.attention:  # before a layer runs without the one whose keys it reads
        KVOption().regions(site, max(1, question.workload.cache_tokens))
    tell = progress or (lambda what, done, total: None)
    chunks = _chunks(question)
    best: tuple[ServingProblem, Solution, int] | None = None
    for done, chunk in enumerate(chunks):
        tell("solving", done, len(chunks))
        problem, solution = solve_at(question, chunk)
        if best is None or _better(solution, best[1]):
            best = (problem, solution, chunk)
        if best[1].fits and (best[1].evaluation.damage <= 0 or question.weight_damages is None):
            break  # nothing to gain, or only published figures to gain it by
    assert best is not None
    tell("solving", len(chunks), len(chunks))
    built, solution, chunk = best
    refined = None
    if solution.fits and (chooser := _chooser(question)) is not None:
        refined = _chosen_by(chooser, built, solution, meter)
        solution = refined.solution
    elif meter is not None and solution.fits and solution.minimised == "damage" and solution.evaluation.damage > 0:
        refined = meter.refine(built, solution)
        solution = refined.solution
    with paused_collection():
        return write_answer(question, built, solution, chunk, refined, _front(built, solution, question))


def _chooser(question: Question) -> str | None:
    """The named recipe that chooses instead of the planner, where one is named."""
    return next((name for name in question.recipes if all_recipes()[name].choose is not None), None)


def _chosen_by(chooser: str, built: ServingProblem, solution: Solution, meter: PlanMeter | None) -> Refined:
    """The solution with the weights that a chooser takes, and its damage. Raises UsageError where plans are not measured."""
    from haversack.plan.choosers import choose_by
    from haversack.plan.refine import Refined

    if meter is None:
        raise UsageError(
            f"{chooser} chooses by plans that are measured; give the model's weights and measure, or leave it out."
        )
    chosen = choose_by(chooser, built, solution, meter)
    return Refined(chosen, meter.judge(built, chosen.chosen), ())


def _chunks(question: Question) -> tuple[int, ...]:
    if question.workload.prefill_chunk_tokens is not None:
        return (question.workload.prefill_chunk_tokens,)
    return tuple(dict.fromkeys(min(chunk, question.workload.prompt_tokens) for chunk in PREFILL_CHUNKS))


def _better(new: Solution, old: Solution) -> bool:
    if new.fits != old.fits:
        return new.fits
    if not new.fits:
        return new.objective < old.objective
    return new.evaluation.damage < old.evaluation.damage * (1 - 1e-6)


@paused_collection()
def solve_at(question: Question, chunk: int) -> tuple[ServingProblem, Solution]:
    """The best solution with one prefill chunk, streaming only where nothing resident fits or where it was asked for."""
    serving = _serving(question, chunk)
    resident, streamed = Resident(), Streamed()
    if question.placement == "mapped":
        return _solve_with(question, serving, (Mapped(),))
    if question.placement == "streamed":
        return _solve_streamed(question, serving, (streamed,))
    # Where nothing is lost whatever is chosen, time decides.
    minimise: Literal["damage", "seconds"] = "seconds" if question.lossless else "damage"
    problem, solution = _solve_with(question, serving, (resident,), minimise=minimise)
    is_short = bool(solution.evaluation.excess_bytes)  # else a bound on speed or damage is missed: no disk mends that
    if solution.fits or question.placement == "resident" or not is_short:
        return problem, solution
    return _solve_streamed(question, serving, (resident, streamed))


def _serving(question: Question, chunk: int) -> Serving:
    users = question.workload.users
    return Serving(
        question.model,
        question.workload,
        question.machine,
        profile_forward(question.model, batch_size=users, new_tokens=chunk),
        profile_forward(question.model, batch_size=users, new_tokens=1),
        forecast_step(question.model, users),
    )


def hopeless(question: Question) -> Answer | None:
    """The answer with the fewest bytes, where that is proven to be too much whatever options are taken; else None.

    It weighs no damage, so that it can be asked before minutes of calibration, or before weights are fetched.
    """
    if question.budget_bytes is None:
        return None
    unknown = Damage(None, "unknown")
    weight_options = dict.fromkeys([WeightOption(), *_uncoded(question)], unknown)
    kv_options = dict.fromkeys([KVOption(), *candidate_options("kv", question.recipes)], unknown)
    free = dataclasses.replace(
        question,
        max_damage=None,
        weight_damages=dict.fromkeys([site.id for site in question.model.weights], weight_options),
        kv_damages=dict.fromkeys([site.id for site in question.model.attention], kv_options),
    )
    placements: dict[str, tuple[Placement, ...]] = {
        "mapped": (Mapped(),),
        "streamed": (Streamed(),),
        "resident": (Resident(),),
        "auto": (Resident(), Streamed()),
    }
    chunk = min(_chunks(question))
    built = _built(free, _serving(question, chunk), placements[question.placement])
    problem = dataclasses.replace(built.problem, capacity_bytes={}, max_seconds=None)
    found = bound(problem, "bytes")
    if found.chosen is None or found.lower_bound <= question.budget_bytes:
        return None
    least = Solution(
        found.chosen,
        "bytes",
        found.objective or 0.0,
        found.lower_bound,
        False,
        problem.evaluate(found.chosen),
        0.0,
        "relaxation",
    )
    return write_answer(free, built, least, chunk, None, ())


def _solve_streamed(
    question: Question, serving: Serving, placements: Sequence[Placement]
) -> tuple[ServingProblem, Solution]:
    """With streaming the slowest options would be the least damaged, so seconds decide where the user set no bound: first
    with everything as it is, then, if that is too much for the window or the cache, with all options."""
    if question.max_damage is not None:
        return _solve_with(question, serving, placements, minimise="seconds")
    if question.workload.min_tokens_per_second is None:
        problem, solution = _solve_with(question, serving, placements, lossless=True, minimise="seconds")
        if solution.fits:
            return problem, solution
    return _solve_with(question, serving, placements)


def _solve_with(
    question: Question,
    serving: Serving,
    placements: Sequence[Placement],
    *,
    lossless: bool = False,
    minimise: Literal["damage", "seconds"] = "damage",
) -> tuple[ServingProblem, Solution]:
    built = _built(question, serving, placements, lossless=lossless)
    return built, _minimise(built.problem, "bytes" if question.budget_bytes is None else minimise, question)


def _built(
    question: Question, serving: Serving, placements: Sequence[Placement], *, lossless: bool = False
) -> ServingProblem:
    model, lossless = question.model, lossless or question.lossless
    options = () if lossless else _uncoded(question)
    asked_for = any_named("weights", question.recipes)
    damages = damage_table(model, options, question.weight_damages, asked_for=asked_for)
    if lossless:
        damages = without_loss(damages)
    weights = [
        weight_candidates(serving, site, _bounded(damages[site.id], question), _placements(site.layer, placements))
        for site in model.weights
    ]
    kv = []
    for site in model.attention:
        if question.kv_damages is not None and not lossless:
            kv_damages: Mapping[KVOption, Damage] = question.kv_damages[site.id]
        else:
            kv_damages = unknown_kv_damages(model, site, () if lossless else candidate_options("kv", question.recipes))
        kv_damages = with_nothing(weights, site.layer, kv_damages)
        kv.append(kv_candidates(serving, site, _bounded(kv_damages, question)))
    speed = question.workload.min_tokens_per_second
    max_seconds = None if speed is None else question.workload.users / speed
    return serving_problem(
        serving,
        weights,
        kv,
        budget_bytes=question.budget_bytes,
        runtime_bytes=question.runtime_bytes,
        max_damage=question.max_damage,
        max_seconds=max_seconds,
    )


Option = TypeVar("Option", WeightOption, KVOption)


def _uncoded(question: Question) -> list[WeightOption]:
    """Options offered whatever the weights are: whether a code holds a matrix, only its values say."""
    return [option for option in candidate_options("weights", question.recipes) if option.code is None]


def _bounded(damages: Mapping[Option, Damage], question: Question) -> Mapping[Option, Damage]:
    """What may be offered: under a bound on damage only what somebody measured, for an unknown damage keeps no bound."""
    if question.max_damage is None:
        return damages
    return {option: damage for option, damage in damages.items() if damage.label != "unknown"}


def _minimise(problem: Problem, what: Literal["damage", "seconds", "bytes"], question: Question) -> Solution:
    """Exact where damages were weighed on this model, and where equal layers leave little to decide. A window that layers
    stream through tells equal layers apart: there published damages get the relaxation's answer, its gap stated, for a
    proof of optimality would prove nothing about the model."""
    solver = Solver(problem)
    if question.weight_damages is not None or solver.num_choices <= EXACT_CHOICES:
        gap = CITED_GAP if question.weight_damages is None and what == "damage" else 0.0
        try:
            return solver.solve(what, time_limit_seconds=EXACT_SECONDS, gap=gap)
        except NoSolutionError:  # bounds on damage and seconds that no budget meets
            return _nearest(problem)
    started = time.perf_counter()
    found = bound(problem, what)
    if found.chosen is None or found.objective is None:
        return dataclasses.replace(_smallest(problem), fits=False)
    evaluation = problem.evaluate(found.chosen)
    seconds = time.perf_counter() - started
    return Solution(found.chosen, what, found.objective, found.lower_bound, True, evaluation, seconds, "relaxation")


def _nearest(problem: Problem) -> Solution:
    """Where no budget meets the bounds: the fastest plan within the budget, or the least damaged one; else the smallest."""
    free, what = dataclasses.replace(problem, max_damage=None), "damage"
    if problem.max_seconds is not None:
        free, what = dataclasses.replace(problem, max_seconds=None), "seconds"
    try:
        found = Solver(free).solve(what, time_limit_seconds=EXACT_SECONDS)  # type: ignore[arg-type]
    except NoSolutionError:
        found = None
    return dataclasses.replace(found if found is not None and found.fits else _smallest(problem), fits=False)


def _smallest(problem: Problem) -> Solution:
    """The fewest bytes that any plan takes, whatever it loses."""
    return Solver(dataclasses.replace(problem, capacity_bytes={}, max_seconds=None, max_damage=None)).solve("bytes")


def _front(built: ServingProblem, solution: Solution, question: Question) -> tuple[dict[str, Any], ...]:
    """Damage against peak bytes, for a calibrated model: the plan itself on the relaxation's front between the smallest plan
    and everything at 16 bits, and every option taken everywhere."""
    if question.weight_damages is None:
        return ()
    tier = "device"
    free = dataclasses.replace(built.problem, capacity_bytes={}, max_damage=None)
    neutral = [next(i for i, c in enumerate(g.choices) if not any(as_tuple(c.damage))) for g in built.problem.groups]
    largest = free.evaluate(neutral).peak_bytes[tier]
    smallest = bound(free, "bytes").evaluation
    low = smallest.peak_bytes[tier] if smallest is not None else solution.evaluation.peak_bytes[tier]
    budgets = [int(low * (largest / low) ** (step / FRONT_POINTS)) for step in range(1, FRONT_POINTS)]
    own = FrontPoint(
        budget_bytes=question.budget_bytes or largest,
        chosen=solution.chosen,
        damage=solution.evaluation.damage,
        lower_bound=solution.lower_bound,
        seconds=solution.evaluation.seconds,
        peak_bytes=solution.evaluation.peak_bytes[tier],
    )
    rows = [
        {"kind": "front", "label": "least damage", "peak_bytes": point.peak_bytes, "damage": point.damage}
        for point in undominated_points([own, *pareto_front(free, budgets, tier=tier, exact=False)])
    ]
    options = dict.fromkeys(c.id for row in built.weights.values() for c in row.values() if not c.option.is_neutral)
    for label, (_, taken) in uniform_baselines(free, neutral, list(options)).items():
        row = {"kind": "uniform", "label": f"{label} everywhere", "peak_bytes": taken.peak_bytes[tier]}
        rows.append({**row, "damage": taken.damage})
    return tuple(row for row in rows if float(str(row["damage"])) > 0)


def _placements(layer: int | None, placements: Sequence[Placement]) -> Sequence[Placement]:
    if layer is not None or any(p.mode != "streamed" for p in placements):
        return placements
    return (Resident(),)
