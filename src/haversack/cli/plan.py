"""`haversack plan`: does it fit, what will it cost, what do I lose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haversack.cli import console
from haversack.cli.money import operators_json, price_line, print_operators
from haversack.cli.question import Asked, Calibrating, Source, Trust, machine_named, spread_options, weighed_answer
from haversack.cli.sweep import check_picture, print_largest, print_sweep
from haversack.errors import UnsupportedModelError, UsageError
from haversack.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from haversack.cost.roofline import Operator
    from haversack.describe.model import Model
    from haversack.plan.question import Answer
    from haversack.plan.schema import DamageRecord

TASKS = ("serve", "tune", "train")


@spread_options
def plan(
    model: Source,
    asked: Asked,
    calibrating: Calibrating,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Weigh options on this model's weights (minutes) instead of citing.")
    ] = False,
    trust_remote_code: Trust = False,
    task: Annotated[str, typer.Option("--task", help="serve, tune or train.")] = "serve",
    batch: Annotated[int, typer.Option("--batch", help="Sequences per step and rank, to tune or train.")] = 1,
    settings: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="KEY=VALUE", help="How to tune or train: optimizer=adamw8bit, zero=3."),
    ] = None,
    largest: Annotated[
        str | None, typer.Option("--largest", help="The largest context, number of users or batch that fits.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option("--sweep", help="Vary context, users or batch; --output draws it (SVG).")
    ] = None,
    operators: Annotated[
        bool, typer.Option("--operators", help="Show each kind of operator's bytes, flops and bottleneck.")
    ] = False,
    prices: Annotated[
        Path | None, typer.Option("--prices", help="What machines cost (TOML); the package's own list if left out.")
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option("--mix", metavar="RATE:PROMPT:ANSWER", help="Requests a second: the cheapest machines for them."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan, or the picture, here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Say whether MODEL fits, what it costs and what is lost. Exits 0 if it fits, 1 if not, 2 on wrong usage."""
    if task not in TASKS:
        raise UsageError(f"--task {task!r} is not one of {', '.join(TASKS)}.")
    if largest is not None and sweep is not None:
        raise UsageError("--largest and --sweep were both given; ask one after the other.")
    if sweep is not None:
        check_picture(output)
    if mix:
        if task != "serve" or sweep or largest or output or asked.says_anything:
            raise UsageError("--mix goes with --prices and --json alone: machines are what is asked for.")
        from haversack.cli.money import fleet_verb
        from haversack.describe.model import describe_model

        return fleet_verb(describe_model(model, trust_remote_code=trust_remote_code), mix, prices, json=json)
    if task != "serve":
        if output is not None and sweep is None:
            raise UsageError("--output writes plans that serve; --task tune and train are printed, or given by --json.")
        if asked.recipe:
            raise UsageError("--recipe restricts plans that serve; leave it out with --task tune and train.")
        from haversack.cli.training import plan_training_verb
        from haversack.describe.model import describe_model

        return plan_training_verb(
            describe_model(model, trust_remote_code=trust_remote_code),
            machine_named(asked.machine),
            task,
            budget=asked.budget,
            tensor_budget=asked.tensor_budget,
            batch=batch,
            seq_len=asked.context,
            pairs=settings or [],
            largest_of=largest,
            sweep_of=sweep,
            picture=output,
            with_operators=operators,
            prices=prices,
            is_this_machine=asked.machine is None,
            json=json,
        )
    if settings:
        raise UsageError("--with is for --task tune and train; serving has options of its own.")
    asked.check()
    from haversack.describe.model import describe_model
    from haversack.formats.output import check_output_file
    from haversack.plan.make import make_plan

    if calibrating.calibration is not None:
        calibrating.text()
    if output is not None:
        check_output_file(output)
    if (sweep is not None or largest is not None) and (calibrate or calibrating.calibration is not None):
        raise UsageError("--sweep and --largest cite damages; leave --calibrate and --calibration out.")
    described = describe_model(model, trust_remote_code=trust_remote_code)
    if sweep is not None or largest is not None:
        from haversack.plan.sweep import largest_served, sweep_serving

        question = asked.question(described, None)
        if sweep is not None:
            points = sweep_serving(question, sweep)
            return print_sweep(points, sweep, budget_bytes=question.budget_bytes, output=output, json=json)
        assert largest is not None
        return print_largest(described.name, largest, largest_served(question, largest), json=json)
    try:
        with console.progress_bar(quiet=json) as progress:
            if calibrate or calibrating.calibration is not None:
                answer, _ = weighed_answer(asked, described, calibrating, progress)
            else:
                answer = make_plan(asked.question(described, None), progress)
    except UnsupportedModelError as problem:
        if output is not None or calibrate:
            raise
        from haversack.cli.native import print_native

        return print_native(asked.question(described, None), str(problem), json=json)
    if output is not None and answer.fits:
        write_plan(answer, output)  # before anything is printed: whoever reads that may leave early
    with console.reader_may_leave():
        rows = serving_rows(described, answer, asked.machine) if operators or json else []
        money = None
        if asked.machine is not None or prices is not None:
            money = price_line(asked.machine or "this machine", prices, _seconds_per_generated(answer))
        if json:
            console.print_json({**plan_json(answer), "operators": operators_json(rows), "per_million_tokens": money})
        else:
            print_answer(answer)
            if described.num_experts:
                active = format_count(described.num_active_parameters)
                console.paragraph(f"{active} of the parameters are active for a token; all experts are resident.")
            if money is not None:
                console.paragraph(f"per million generated tokens: {money}.")
            if operators:
                typer.echo("")
                print_operators(rows)
    if output is not None and not answer.fits:
        write_plan(answer, output)
    return 0 if answer.fits else 1


def write_plan(answer: Answer, output: Path) -> None:
    """Write a plan file whole or not at all. Raises DoesNotFitError for a plan that does not fit."""
    from haversack.formats.output import write_whole

    write_whole(output, answer.require_fit().to_json())


def plan_json(answer: Answer) -> dict[str, Any]:
    """What `plan --json` prints: the answer's figures on top, the whole plan below."""
    plan, prediction = answer.plan, answer.plan.prediction
    return {
        "fits": answer.fits,
        "budget_bytes": plan.budget.num_bytes,
        "budget_kind": plan.budget.kind,
        "peak_bytes": prediction.peak_bytes,
        "peak_time_point": prediction.peak_time_point,
        "shortfall_bytes": answer.shortfall_bytes,
        "cheapest_change": answer.cheapest_change,
        "timeline": prediction.timeline,
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


def serving_rows(model: Model, answer: Answer, machine: str | None) -> list[Operator]:
    """The plan's operators, prefill and the last step."""
    from haversack.cost.roofline import serving_operators
    from haversack.describe.workload import ServeWorkload

    plan = answer.plan
    return serving_operators(
        model,
        ServeWorkload.from_dict(plan.workload),
        machine_named(machine),
        stored_bytes={row.site: row.stored_bytes for row in plan.weights},
        kv_bytes=sum(row.stored_bytes for row in plan.kv),
        chunk_tokens=plan.prefill_chunk_tokens,
    )


def _seconds_per_generated(answer: Answer) -> float | None:
    """Seconds of the machine per generated token, the prompts' share included; None where nothing is generated."""
    prediction, workload = answer.plan.prediction, answer.plan.workload
    generated = workload["users"] * workload["generate_tokens"]
    if not generated:
        return None
    return (prediction.prefill_seconds + workload["generate_tokens"] * prediction.seconds_per_token) / generated


def print_answer(answer: Answer) -> None:
    """The answer as tables of at most 80 columns."""
    plan = answer.plan
    budget = plan.budget.num_bytes
    workload = plan.workload
    of = "the whole process" if plan.budget.kind == "process" else "tensors alone"
    verdict = "fits" if answer.fits else "does not fit"
    asked = f" in {format_bytes(budget)}" if budget else ""
    console.paragraph(
        f"{plan.model.name}: {format_count(plan.model.num_parameters)} parameters, {format_bytes(plan.model.num_bytes)} "
        f"as they are ({plan.model.dtype})."
    )
    console.paragraph(
        f"{workload['users']} x ({workload['prompt_tokens']} prompt + {workload['generate_tokens']} generated) tokens: "
        f"{verdict}{asked} ({of})."
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
            f"{format_seconds(prediction.seconds_per_token)} per step, {speed:.3g} tokens/s by the machine's rates",
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

    groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
    labels: dict[str, str] = {}
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
