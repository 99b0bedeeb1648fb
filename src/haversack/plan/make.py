"""From a question to a plan: describe, cost, solve, and write down what was chosen and why."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from haversack._version import __version__
from haversack.cost.candidates import (
    ASSUMED_DISK_BYTES_PER_SECOND,
    ASSUMED_READ_BYTES_PER_SECOND,
    KVCandidate,
    Serving,
    WeightCandidate,
    kv_candidates,
    weight_candidates,
)
from haversack.cost.damage import Damage
from haversack.cost.damages import damage_table, total_damage, unknown_kv_damages
from haversack.cost.serving import ServingProblem, serving_problem
from haversack.describe.machine import Machine
from haversack.describe.model import Model
from haversack.describe.workload import ServeWorkload, check_positions
from haversack.engine.profile import profile_forward
from haversack.errors import DoesNotFitError
from haversack.parts.kv.base import KVOption
from haversack.parts.placement.base import Placement
from haversack.parts.placement.mapped import Mapped
from haversack.parts.placement.resident import Resident
from haversack.parts.placement.streamed import Streamed
from haversack.parts.weights.base import WeightOption
from haversack.plan.schema import (
    Budget,
    DamageRecord,
    KVChoice,
    ModelRecord,
    Plan,
    Prediction,
    Solve,
    WeightChoice,
)
from haversack.recipes.base import candidate_options
from haversack.solve.bound import bound
from haversack.solve.exact import Solution, solve
from haversack.solve.front import pareto_front, uniform_baselines
from haversack.solve.problem import Problem, as_tuple
from haversack.units import format_bytes

if TYPE_CHECKING:
    from haversack.plan.refine import PlanMeter, Refined

DEFAULT_RUNTIME_BYTES = 280 * 2**20
"""Private bytes of a process that has imported torch 2.13 (CPU) and transformers 5.23, where this machine's own figure
was never measured. Plans that use it say so."""

PREFILL_CHUNKS = (512, 128, 32)
"""Chunks tried in this order; a smaller one is taken only where it saves damage or makes a plan fit."""

EXACT_SECONDS = 60.0
"""Limit of the integer program; the gap it reached by then is in the plan."""

FRONT_POINTS = 10

PlacementPolicy = Literal["auto", "resident", "mapped", "streamed"]


@dataclass(frozen=True)
class Question:
    """What is asked: a model, a workload and a machine, within `budget_bytes` or at most `max_damage` nats.

    `budget_kind` "process" counts the whole process's peak, "tensor" our tensors only. `placement` "auto" keeps weights
    resident and streams from disk only where nothing resident fits. `lossless` offers only what changes no value.
    """

    model: Model
    workload: ServeWorkload
    machine: Machine
    budget_bytes: int | None
    budget_kind: Literal["process", "tensor"] = "process"
    max_damage: float | None = None
    placement: PlacementPolicy = "auto"
    weight_damages: Mapping[str, Mapping[WeightOption, Damage]] | None = None
    kv_damages: Mapping[str, Mapping[KVOption, Damage]] | None = None
    lossless: bool = False

    @property
    def runtime_bytes(self) -> int:
        if self.budget_kind == "tensor":
            return 0
        return self.machine.rates.runtime_private_bytes or DEFAULT_RUNTIME_BYTES


@dataclass(frozen=True)
class Answer:
    """A plan and whether it fits. Where nothing fits, the plan is the smallest there is and `shortfall_bytes` is positive."""

    plan: Plan
    fits: bool
    shortfall_bytes: int
    cheapest_change: str | None = None

    @property
    def problem(self) -> str:
        """What is in the way, in one sentence: bytes where they are short, else the other bounds that nothing keeps."""
        prediction, budget = self.plan.prediction, self.plan.budget
        bounds = []
        if budget.max_damage is not None:
            bounds.append(f"at most {budget.max_damage:g} nats per token")
        if (speed := self.plan.workload.get("min_tokens_per_second")) is not None:
            bounds.append(f"at least {speed:g} tokens/s")
        if not self.shortfall_bytes:
            within = f" within {format_bytes(budget.num_bytes)}" if budget.num_bytes else ""
            return f"No plan for {self.plan.model.name} keeps {' and '.join(bounds) or 'what was asked'}{within}."
        owners = self.plan.ledger.owners_at(prediction.peak_time_point)
        largest = ", ".join(f"{owner} {format_bytes(n)}" for owner, n in list(owners.items())[:3])
        under = f" at {' and '.join(bounds)}" if bounds else ""
        return (
            f"{self.plan.model.name} needs {format_bytes((budget.num_bytes or 0) + self.shortfall_bytes)} at {prediction.peak_time_point} "
            f"({largest}) or more{under}, but the budget is {format_bytes(budget.num_bytes or 0)}: "
            f"{format_bytes(self.shortfall_bytes)} short."
        )

    def require_fit(self) -> Plan:
        """The plan. Raises DoesNotFitError with shortfall, owners and the cheapest change."""
        if self.fits:
            return self.plan
        prediction, budget = self.plan.prediction, self.plan.budget.num_bytes or 0
        raise DoesNotFitError(
            self.problem,
            budget_bytes=budget,
            shortfall_bytes=self.shortfall_bytes,
            owners=self.plan.ledger.owners_at(prediction.peak_time_point),
            cheapest_change=self.cheapest_change,
        )


def make_plan(
    question: Question, progress: Callable[[str, int, int], None] | None = None, meter: PlanMeter | None = None
) -> Answer:
    """Answer a question; with `meter`, whole plans are measured and the search corrected.

    Raises UsageError if the context is beyond the model's positions.
    """
    check_positions(question.workload, question.model.max_positions, question.model.name)
    tell = progress or (lambda what, done, total: None)
    if question.workload.prefill_chunk_tokens is not None:
        chunks: tuple[int, ...] = (question.workload.prefill_chunk_tokens,)
    else:
        prompt = question.workload.prompt_tokens
        chunks = tuple(dict.fromkeys(min(chunk, prompt) for chunk in PREFILL_CHUNKS))
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
    if meter is not None and solution.fits and solution.minimised == "damage" and solution.evaluation.damage > 0:
        refined = meter.refine(built, solution)
        solution = refined.solution
    return _answer(question, built, solution, chunk, refined)


def _better(new: Solution, old: Solution) -> bool:
    if new.fits != old.fits:
        return new.fits
    if not new.fits:
        return new.objective < old.objective
    return new.evaluation.damage < old.evaluation.damage * (1 - 1e-6)


def solve_at(question: Question, chunk: int) -> tuple[ServingProblem, Solution]:
    """The best solution with one prefill chunk, streaming only where nothing resident fits or where it was asked for."""
    users = question.workload.users
    serving = Serving(
        question.model,
        question.workload,
        question.machine,
        profile_forward(question.model, batch_size=users, new_tokens=chunk),
        profile_forward(question.model, batch_size=users, new_tokens=1),
    )
    resident, streamed = Resident(), Streamed()
    if question.placement == "mapped":
        return _solve_with(question, serving, (Mapped(),))
    if question.placement == "streamed":
        return _solve_streamed(question, serving, (streamed,))
    problem, solution = _solve_with(question, serving, (resident,))
    if solution.fits or question.placement == "resident":
        return problem, solution
    return _solve_streamed(question, serving, (resident, streamed))


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
    model, lossless = question.model, lossless or question.lossless
    options: tuple[WeightOption, ...] = () if lossless else candidate_options("weights")
    damages = damage_table(model, options, None if lossless else question.weight_damages)
    weights = [
        weight_candidates(serving, site, damages[site.id], _placements(site.layer, placements))
        for site in model.weights
    ]
    kv = []
    for site in model.attention:
        if question.kv_damages is not None and not lossless:
            kv_damages: Mapping[KVOption, Damage] = question.kv_damages[site.id]
        else:
            kv_damages = unknown_kv_damages(model, site, () if lossless else candidate_options("kv"))
        kv.append(kv_candidates(serving, site, kv_damages))
    speed = question.workload.min_tokens_per_second
    max_seconds = None if speed is None else question.workload.users / speed
    built = serving_problem(
        serving,
        weights,
        kv,
        budget_bytes=question.budget_bytes,
        runtime_bytes=question.runtime_bytes,
        max_damage=question.max_damage,
        max_seconds=max_seconds,
    )
    return built, _minimise(built.problem, "bytes" if question.budget_bytes is None else minimise, question)


def _minimise(problem: Problem, what: Literal["damage", "seconds", "bytes"], question: Question) -> Solution:
    """Exact where damages were weighed on this model. Published ones are the same for every layer: there the relaxation
    answers in milliseconds with its gap stated, and a proof of optimality would prove nothing about the model."""
    if question.weight_damages is not None:
        return solve(problem, what, time_limit_seconds=EXACT_SECONDS)
    started = time.perf_counter()
    found = bound(problem, what)
    fits = found.chosen is not None
    if not fits:  # the smallest there is, whatever it loses
        what = "bytes"
        found = bound(dataclasses.replace(problem, capacity_bytes={}, max_seconds=None, max_damage=None), what)
    if found.chosen is None or found.objective is None:
        return solve(problem, what, time_limit_seconds=EXACT_SECONDS)
    return Solution(
        found.chosen,
        what,
        found.objective,
        found.lower_bound,
        fits,
        problem.evaluate(found.chosen),
        time.perf_counter() - started,
    )


def _front(built: ServingProblem, solution: Solution, question: Question) -> tuple[dict[str, Any], ...]:
    """Damage against peak bytes, for a calibrated model: the relaxation's front between the smallest plan and everything at
    16 bits, and every option taken everywhere."""
    if question.weight_damages is None:
        return ()
    tier = "device"
    free = dataclasses.replace(built.problem, capacity_bytes={}, max_damage=None)
    neutral = [next(i for i, c in enumerate(g.choices) if not as_tuple(c.damage)[0]) for g in built.problem.groups]
    largest = free.evaluate(neutral).peak_bytes[tier]
    smallest = bound(free, "bytes").evaluation
    low = smallest.peak_bytes[tier] if smallest is not None else solution.evaluation.peak_bytes[tier]
    budgets = [low + (largest - low) * step // FRONT_POINTS for step in range(1, FRONT_POINTS)]
    rows = [
        {"kind": "front", "label": "least damage", "peak_bytes": point.peak_bytes, "damage": point.damage}
        for point in pareto_front(free, budgets, tier=tier, exact=False)
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


def _answer(
    question: Question, built: ServingProblem, solution: Solution, chunk: int, refined: Refined | None
) -> Answer:
    chosen = built.problem.describe(solution.chosen)
    weights, kv = built.candidates(chosen)
    ledger = built.ledger(chosen)
    peak_point, peak_bytes = ledger.peak()
    assert peak_bytes <= solution.evaluation.peak_bytes["device"], "the ledger never passes what the solver booked"
    serving = built.serving
    if refined is None:
        damage = total_damage([c.damage for c in weights] + [c.damage for c in kv])
    else:
        damage = Damage(refined.damage, "measured", source="KL of the whole plan on calibration text")
    prediction = Prediction(
        timeline=ledger.to_dict(),
        peak_bytes=peak_bytes,
        peak_time_point=peak_point,
        tensor_peak_bytes=peak_bytes - question.runtime_bytes,
        disk_bytes=sum(c.stored_bytes for c in weights) + built.fixed.get("rest", 0),
        seconds_per_token=solution.evaluation.seconds,
        prefill_seconds=_prefill_seconds(serving, weights),
        load_seconds=sum(c.stored_bytes for c in weights if c.placement.mode == "resident") / serving.disk_rate,
        damage=DamageRecord(**damage.to_dict()),
    )
    plan = Plan(
        haversack=__version__,
        model=ModelRecord(
            name=str(question.model.name),
            source=_source(question.model),
            architecture=question.model.architecture,
            fingerprint=question.model.fingerprint,
            dtype=question.model.dtype,
            num_parameters=question.model.num_parameters,
            num_bytes=question.model.num_bytes,
        ),
        machine=_machine_record(question.machine),
        workload=question.workload.to_dict(),
        budget=Budget(kind=question.budget_kind, num_bytes=question.budget_bytes, max_damage=question.max_damage),
        prefill_chunk_tokens=chunk,
        weights=tuple(_weight_record(c, built.weights[c.site.id]) for c in weights),
        kv=tuple(_kv_record(c, built.kv[c.site.id]) for c in kv),
        prediction=prediction,
        solve=Solve(
            method=f"{'relaxation' if question.weight_damages is None else 'integer program'}, least {solution.minimised}",
            gap=solution.gap,
            seconds=solution.seconds_to_solve,
            num_groups=len(built.problem.groups),
            num_choices=sum(len(group.choices) for group in built.problem.groups),
            evaluations=0 if refined is None else len(refined.trials),
        ),
        front=_front(built, solution, question),
        notes=_notes(question),
    ).sealed()
    # What the solver booked, not the prediction: it holds a stream window's pages back, and a plan needs them to be found.
    needed = solution.evaluation.peak_bytes["device"]
    shortfall = 0 if question.budget_bytes is None else max(0, needed - question.budget_bytes)
    fits = solution.fits and shortfall == 0
    return Answer(plan, fits, shortfall, None if fits else _cheapest_change(question, plan, needed))


def _source(model: Model) -> str:
    if model.folder is not None and model.hub_id is None:
        return str(model.folder.absolute())
    return "@".join(part for part in (model.hub_id or model.name, model.revision) if part)


def _prefill_seconds(serving: Serving, weights: Sequence[WeightCandidate]) -> float:
    """Two flops per weight and token over the measured matrix rate; reading the weights once per chunk is the floor."""
    tokens = serving.workload.prompt_tokens * serving.workload.users
    inside = sum(c.site.num_parameters for c in weights if c.site.role not in ("embedding", "position", "head"))
    rate = serving.machine.matmul_rate("bf16") or serving.machine.matmul_rate("fp32")
    chunks = len(serving.workload.prefill_chunks(serving.prefill.new_tokens))
    floor = chunks * sum(max(c.seconds, c.disk_seconds) for c in weights)
    return max(floor, 2 * inside * tokens / rate) if rate else floor


def _weight_record(c: WeightCandidate, row: Mapping[str, WeightCandidate]) -> WeightChoice:
    return WeightChoice(
        site=c.site.id,
        role=c.site.role,
        layer=c.site.layer,
        num_parameters=c.site.num_parameters,
        option=c.option.to_dict(),
        placement=c.placement.to_dict(),
        stored_bytes=c.stored_bytes,
        neutral_bytes=c.site.num_bytes,
        damage=c.damage.nats if c.damage.label != "unknown" else None,
        seconds=max(c.seconds, c.disk_seconds),
        why=_why(c, row.values()),
    )


def _kv_record(c: KVCandidate, row: Mapping[str, KVCandidate]) -> KVChoice:
    neutral = next(other for other in row.values() if other.option.is_neutral)
    return KVChoice(
        site=c.site.id,
        layer=c.site.layer,
        option=c.option.to_dict(),
        stored_bytes=c.stored_bytes,
        neutral_bytes=neutral.stored_bytes,
        damage=c.damage.nats if c.damage.label != "unknown" else None,
        why=_why(c, row.values()),
    )


def _why(chosen: Any, row: Any) -> str:
    """The nearest step up that was not taken, and the nearest step down."""
    nats = chosen.damage.nats or 0.0
    up = [c for c in row if (c.damage.nats or 0.0) < nats and c.stored_bytes > chosen.stored_bytes]
    down = [c for c in row if (c.damage.nats or 0.0) > nats and c.stored_bytes < chosen.stored_bytes]
    reasons = []
    if up:
        better = max(up, key=lambda c: (nats - (c.damage.nats or 0.0)) / (c.stored_bytes - chosen.stored_bytes))
        extra = better.stored_bytes - chosen.stored_bytes
        reasons.append(
            f"{better.option.label} would lose {_nats(nats - (better.damage.nats or 0.0))} less for {format_bytes(extra)}"
        )
    if down:
        worse = min(down, key=lambda c: ((c.damage.nats or 0.0) - nats) / (chosen.stored_bytes - c.stored_bytes))
        saved = chosen.stored_bytes - worse.stored_bytes
        reasons.append(
            f"{worse.option.label} would lose {_nats((worse.damage.nats or 0.0) - nats)} more and save {format_bytes(saved)}"
        )
    return "; ".join(reasons) or "the only option"


def _nats(value: float) -> str:
    return f"{value:.2g} nats"


def _cheapest_change(question: Question, plan: Plan, needed: int) -> str:
    """One sentence: what would make it fit, nearest first. `needed` is the smallest budget that has a plan."""
    workload = question.workload
    if needed <= (question.budget_bytes or needed):
        damage, seconds = plan.prediction.damage.nats, plan.prediction.seconds_per_token
        loses = f" and loses {damage:.3g} nats per token" if damage is not None else ""
        speed = f"{workload.users / seconds:.3g} tokens/s" if seconds else "its speed"
        return f"The smallest plan decodes at {speed}{loses}; relax the bound that it misses."
    sentence = f"A budget of {format_bytes(needed)} would do"
    kv = plan.ledger.timeline["decode"].get("kv", {}).get("device", 0)
    shortfall = needed - (question.budget_bytes or 0)
    if 0 < shortfall < kv:
        tokens = int(workload.context_tokens * (1 - shortfall / kv))
        if tokens > 1:
            return f"{sentence}, or a context of about {tokens} tokens instead of {workload.context_tokens}."
    if workload.users > 1:
        return f"{sentence}, or fewer users than {workload.users}."
    return sentence + "."


def _machine_record(machine: Machine) -> dict[str, Any]:
    return {
        "name": machine.name,
        "cores": machine.cores,
        "cpu_model": machine.cpu_model,
        "memory_bytes": machine.memory_bytes,
        "read_bytes_per_second": machine.read_rate(),
        "disk_read_bytes_per_second": machine.rates.disk_read_bytes_per_second,
        "source": machine.rates.source,
    }


def _notes(question: Question) -> tuple[str, ...]:
    notes = []
    if question.machine.read_rate() is None:
        notes.append(
            f"seconds assume {ASSUMED_READ_BYTES_PER_SECOND / 1e9:g} GB/s of memory reads: not measured (`haversack machine --measure`)"
        )
    if question.machine.rates.disk_read_bytes_per_second is None:
        notes.append(f"disk reads are assumed at {ASSUMED_DISK_BYTES_PER_SECOND / 1e9:g} GB/s: not measured")
    if question.budget_kind == "process" and question.machine.rates.runtime_private_bytes is None:
        notes.append(f"the runtime is taken as {format_bytes(DEFAULT_RUNTIME_BYTES)}: not measured on this machine")
    return tuple(notes)
