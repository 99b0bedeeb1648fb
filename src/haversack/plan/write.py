"""Writing an answer down: the ledger, the prediction, why each site got what it got, and the cheapest change where nothing
fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from haversack._version import __version__
from haversack.cost.as_stored import stored_options
from haversack.cost.candidates import (
    ASSUMED_DISK_BYTES_PER_SECOND,
    ASSUMED_READ_BYTES_PER_SECOND,
    KVCandidate,
    Serving,
    SharedCosts,
    WeightCandidate,
    candidate_id,
)
from haversack.cost.damages import total_damage
from haversack.cost.serving import ServingProblem
from haversack.describe.checkpoint import holds_weights, pickled_weights
from haversack.describe.machine import Machine
from haversack.describe.model import Model
from haversack.plan.question import DEFAULT_RUNTIME_BYTES, Answer, Question
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
from haversack.solve.exact import Solution
from haversack.units import format_bytes, format_rate

if TYPE_CHECKING:
    from haversack.plan.refine import Refined


def write_answer(
    question: Question,
    built: ServingProblem,
    solution: Solution,
    chunk: int,
    refined: Refined | None,
    front: tuple[dict[str, Any], ...],
) -> Answer:
    """The answer that a solution stands for; `front` is drawn beside it."""
    chosen = built.problem.describe(solution.chosen)
    weights, kv = built.candidates(chosen)
    ledger = built.ledger(chosen)
    peak_point, peak_bytes = ledger.peak()
    assert peak_bytes <= solution.evaluation.peak_bytes["device"], "the ledger never passes what the solver booked"
    serving = built.serving
    if refined is None:
        damage = total_damage([c.damage for c in weights] + [c.damage for c in kv])
    else:
        damage = refined.damage
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
        weights=_weight_records(weights, built),
        kv=tuple(_kv_record(c, built.kv[c.site.id]) for c in kv),
        prediction=prediction,
        solve=Solve(
            method=f"{solution.method}, least {solution.minimised}",
            gap=solution.gap,
            seconds=solution.seconds_to_solve,
            num_groups=len(built.problem.groups),
            num_choices=sum(len(group.choices) for group in built.problem.groups),
            evaluations=0 if refined is None else len(refined.trials),
        ),
        recipes=question.recipes,
        front=front,
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
    """Two flops per weight and token over the measured matrix rate, int8's where activations have 8 bits; reading the weights
    once per chunk is the floor."""
    tokens = serving.workload.prompt_tokens * serving.workload.users
    inside = [c for c in weights if c.site.role not in ("embedding", "position", "head")]
    rates = {bits: serving.machine.product_rate(bits) for bits in (8, 16)}
    chunks = len(serving.workload.prefill_chunks(serving.prefill.new_tokens))
    floor = chunks * sum(max(c.seconds, c.disk_seconds) for c in weights)
    products = sum(2 * c.site.num_parameters * tokens / (rates[c.option.activation_bits] or math.inf) for c in inside)
    return max(floor, products)


def _weight_records(weights: Sequence[WeightCandidate], built: ServingProblem) -> tuple[WeightChoice, ...]:
    """Options are few and experts are many, so that each option is spelled out once."""
    written = {option: option.to_dict() for option in dict.fromkeys(c.option for c in weights)}
    reasons: dict[tuple[SharedCosts, str], str] = {}
    records = []
    for c in weights:
        shared, candidate = built.weights[c.site.id].shared, candidate_id(c.option, c.placement)
        if (shared, candidate) not in reasons:
            reasons[shared, candidate] = _why(shared.rows[candidate], shared.rows.values())
        records.append(_weight_record(c, written[c.option], reasons[shared, candidate]))
    return tuple(records)


def _weight_record(c: WeightCandidate, option: dict[str, Any], why: str) -> WeightChoice:
    return WeightChoice(
        site=c.site.id,
        role=c.site.role,
        layer=c.site.layer,
        num_parameters=c.site.num_parameters,
        option=option,
        placement=c.placement.to_dict(),
        stored_bytes=c.stored_bytes,
        neutral_bytes=c.site.num_bytes,
        damage=c.damage.nats if c.damage.label != "unknown" else None,
        seconds=max(c.seconds, c.disk_seconds),
        why=why,
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
        speed = f"{format_rate(workload.users / seconds)} tokens/s" if seconds else "its speed"
        return f"The nearest plan decodes at {speed}{loses}; relax the bound that it misses."
    sentence = f"A budget of {format_bytes(needed)} would do"
    kv = plan.ledger.timeline["decode"].get("kv", {}).get("device", 0)
    shortfall = needed - (question.budget_bytes or 0)
    if 0 < shortfall < kv:
        tokens = int(workload.context_tokens * (1 - shortfall / kv))
        if tokens > 1:
            sentence += f", or a context of about {tokens} tokens instead of {workload.context_tokens}"
    elif workload.users > 1:
        sentence += f", or fewer users than {workload.users}"
    if question.weight_damages is None:
        sentence += "; `--calibrate` may find less, since it weighs options that nobody published figures for"
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
    if question.recipes:
        notes.append(f"restricted to the recipes {', '.join(question.recipes)}, and to `as is`")
    if question.weight_damages is None and any(
        option.code is not None for option in candidate_options("weights", question.recipes) if question.recipes
    ):
        notes.append(
            "whether a code holds a matrix only the weights themselves say: `pack`, or `plan --calibrate`, read them"
        )
    if question.model.folder is not None and (pickles := pickled_weights(question.model.folder)):
        notes.append(f"the weights are pickled ({pickles[0]}), which `pack` refuses: convert them to safetensors first")
    for title, num_bytes in question.model.quantized.items():
        notes.append(
            f"the checkpoint stores {format_bytes(num_bytes)} as {title}; `as is` means what they stand for, in 16 bits"
        )
    stored_as = question.model.config.get("quantization_config") or {}
    if stored_as and not holds_weights(question.model.folder):
        notes.append(
            f"its config says that the weights are stored as {stored_as.get('quant_method', 'codes')}; they are not here, so that all is planned "
            "in the 16 bits that they stand for: name the whole folder to count and keep the codes"
        )
    if question.model.quantized and not (kept := len(stored_options(question.model))):
        notes.append("nothing of it lies on a grid that kernels read, so that no codes can be kept as stored")
    elif question.model.quantized:
        notes.append(
            f"`as-stored` keeps the checkpoint's own codes, which {kept} of {len(question.model.weights)} matrices have"
        )
    if question.machine.read_rate() is None:
        notes.append(
            f"seconds assume {ASSUMED_READ_BYTES_PER_SECOND / 1e9:g} GB/s of memory reads: not measured (`haversack machine --measure`)"
        )
    if question.machine.rates.disk_read_bytes_per_second is None:
        notes.append(f"disk reads are assumed at {ASSUMED_DISK_BYTES_PER_SECOND / 1e9:g} GB/s: not measured")
    if question.budget_kind == "process" and question.machine.rates.runtime_private_bytes is None:
        notes.append(f"the runtime is taken as {format_bytes(DEFAULT_RUNTIME_BYTES)}: not measured on this machine")
    return tuple(notes)
