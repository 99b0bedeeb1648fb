"""What `plan` and `pack` print of a plan that serves: JSON, or tables of at most 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from haversack.cli import console
from haversack.cli.verdict import verdict_json, verdict_words
from haversack.units import format_bytes, format_count, format_rate, format_seconds

if TYPE_CHECKING:
    from haversack.plan.question import Answer
    from haversack.plan.schema import DamageRecord


def plan_json(answer: Answer) -> dict[str, Any]:
    """What `plan --json` prints: the answer's figures on top, the whole plan below."""
    plan, prediction = answer.plan, answer.plan.prediction
    return {
        **verdict_json(
            plan.ledger,
            fits=answer.fits,
            budget_bytes=plan.budget.num_bytes,
            budget_kind=plan.budget.kind,
            shortfall_bytes=answer.shortfall_bytes,
            cheapest_change=answer.cheapest_change,
        ),
        "damage": prediction.damage.model_dump(),
        "seconds": {
            "per_token": prediction.seconds_per_token,
            "prefill": prediction.prefill_seconds,
            "load": prediction.load_seconds,
        },
        "sites": [row.model_dump() for row in plan.weights] + [row.model_dump() for row in plan.kv],
        "prediction_hash": plan.prediction_hash,
        "plan": plan.model_dump(mode="json", exclude={"weights", "kv", "prediction"}),
    }


def print_answer(answer: Answer) -> None:
    """The answer as tables of at most 80 columns."""
    plan = answer.plan
    workload = plan.workload
    verdict = verdict_words(fits=answer.fits, budget_bytes=plan.budget.num_bytes, budget_kind=plan.budget.kind)
    console.paragraph(
        f"{plan.model.name}: {format_count(plan.model.num_parameters)} parameters, {format_bytes(plan.model.num_bytes)} "
        f"as they are ({plan.model.dtype})."
    )
    console.paragraph(
        f"{workload['users']} x ({workload['prompt_tokens']} prompt + {workload['generate_tokens']} generated) tokens: "
        f"{verdict}."
    )
    if not answer.fits:
        console.paragraph(f"{answer.problem} {answer.cheapest_change or ''}".rstrip())
    typer.echo("")
    console.ledger_table(answer.plan.ledger)
    typer.echo("")
    console.table(("what", "predicted"), _figures(answer))
    typer.echo("")
    console.table(("option", "placement", "sites", "bytes", "of 16 bits"), _mix(answer), right=(2, 3, 4))
    console.notes(plan.notes)


def _figures(answer: Answer) -> list[tuple[str, str]]:
    prediction = answer.plan.prediction
    speed = answer.plan.workload["users"] / prediction.seconds_per_token if prediction.seconds_per_token else 0
    return [
        (
            "peak",
            f"{format_bytes(prediction.peak_bytes)} ({prediction.peak_bytes:,} bytes) at {prediction.peak_time_point}",
        ),
        ("on disk", format_bytes(prediction.disk_bytes)),
        (
            "decode",
            f"{format_seconds(prediction.seconds_per_token)} per step, {format_rate(speed)} tokens/s by the machine's rates",
        ),
        (
            "prefill",
            f"{format_seconds(prediction.prefill_seconds)}, {answer.plan.prefill_chunk_tokens} tokens at a time",
        ),
        ("load", format_seconds(prediction.load_seconds)),
        ("damage", damage_words(prediction.damage)),
        ("prediction", answer.plan.prediction_hash[:16]),
    ]


def damage_words(damage: DamageRecord) -> str:
    """`0.0123 nats per token (proxied)`, with the range and what is unknown."""
    if damage.nats is None:
        known = f"; at least {damage.low:.3g} nats from what was published" if damage.low else ""
        return f"unknown{known}"
    if damage.nats == 0:
        return "none: everything stays as it is"
    probed = f"; worst probe {damage.worst_probe} {damage.probes[damage.worst_probe]:.4g}" if damage.worst_probe else ""
    has_span = damage.low is not None and damage.high is not None and damage.low < damage.high
    span = f", {damage.low:.3g} to {damage.high:.3g}" if has_span else ""
    return f"{damage.nats:.4g} nats per token ({damage.label}{span}){probed}"


def _mix(answer: Answer) -> list[tuple[str, str, str, str, str]]:
    """Options by how often they were taken."""
    from haversack.parts.kv.base import KVOption
    from haversack.parts.weights.base import WeightOption

    labels: dict[str, str] = {}
    groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for row in answer.plan.weights:
        written = repr(row.option)
        if written not in labels:
            labels[written] = WeightOption.from_dict(row.option).label
        key = (labels[written], row.placement["part"])
        groups.setdefault(key, []).append((row.stored_bytes, row.neutral_bytes))
    for kv in answer.plan.kv:
        groups.setdefault((KVOption.from_dict(kv.option).label, "keys and values"), []).append(
            (kv.stored_bytes, kv.neutral_bytes)
        )
    out = []
    for (label, where), sizes in groups.items():
        stored, neutral = (sum(column) for column in zip(*sizes, strict=True))
        out.append((label, where, str(len(sizes)), format_bytes(stored), f"{stored / max(1, neutral):.1%}"))
    return out
