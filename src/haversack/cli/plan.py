"""`haversack plan`: does it fit, what will it cost, what do I lose."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from haversack.cli import console
from haversack.cli.answer import plan_json, print_answer
from haversack.cli.money import operators_json, price_line, print_operators
from haversack.cli.question import Asked, Calibrating, Source, Trust, machine_named, spread_options, weighed_answer
from haversack.cli.sweep import print_largest, print_largest_model, print_sweep
from haversack.cli.wanted import Wanted
from haversack.errors import UnsupportedModelError
from haversack.units import format_count

if TYPE_CHECKING:
    from haversack.cost.roofline import Operator
    from haversack.describe.model import Model
    from haversack.plan.question import Answer, Question


@spread_options
def plan(
    model: Source,
    asked: Asked,
    calibrating: Calibrating,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Weigh options on this model's weights (minutes) instead of citing.")
    ] = False,
    trust_remote_code: Trust = False,
    *,
    wanted: Wanted,
) -> int:
    """Say whether MODEL fits, what it costs and what is lost. Exits 0 if it fits, 1 if not, 2 on wrong usage."""
    wanted.check(asked, calibrating, calibrate=calibrate)
    weighed = calibrate or calibrating.calibration is not None
    if weighed:
        calibrating.text()  # read before the model, so that a wrong file is said at once
    from haversack.cli.lean import plan_alone
    from haversack.describe.model import describe_model

    if not weighed:
        plan_alone()
    describe = functools.partial(describe_model, trust_remote_code=trust_remote_code)
    if wanted.largest == "model":
        return _largest_model([describe(name) for name in (model, *(wanted.among or ()))], asked, wanted)
    described = describe(model)
    if wanted.mix:
        from haversack.cli.money import fleet_verb

        return fleet_verb(described, wanted.mix, wanted.prices, json=wanted.json)
    if wanted.task != "serve":
        from haversack.cli.training import plan_training_verb

        return plan_training_verb(described, asked, wanted)
    if wanted.varies:
        return _vary(asked.question(described, None), wanted)
    return _plan_serving(described, asked, calibrating if weighed else None, wanted)


def _vary(question: Question, wanted: Wanted) -> int:
    """Answer --sweep, or --largest."""
    from haversack.plan.sweep import largest_served, sweep_serving

    if wanted.sweep is not None:
        points = sweep_serving(question, wanted.sweep)
        return print_sweep(
            points, wanted.sweep, budget_bytes=question.budget_bytes, output=wanted.output, json=wanted.json
        )
    assert wanted.largest is not None
    value = largest_served(question, wanted.largest)
    return print_largest(question.model.name, wanted.largest, value, json=wanted.json)


def _largest_model(models: Sequence[Model], asked: Asked, wanted: Wanted) -> int:
    """Answer --largest model: which of several fit, the largest named."""
    from haversack.cli.training import training_question
    from haversack.plan.sweep import compare_served, compare_trained

    if wanted.task == "serve":
        fits = compare_served([asked.question(model, None) for model in models])
    else:
        fits = compare_trained([training_question(model, asked, wanted) for model in models])
    return print_largest_model(fits, json=wanted.json)


def _plan_serving(
    model: Model,
    asked: Asked,
    calibrating: Calibrating | None,
    wanted: Wanted,
) -> int:
    """Plan, write the plan where it fits, and print the answer. Without `calibrating`, damages are cited."""
    from haversack.plan.make import make_plan

    output, json = wanted.output, wanted.json
    try:
        with console.progress_bar(quiet=json) as progress:
            if calibrating is not None:
                answer, _ = weighed_answer(asked, model, calibrating, progress)
            else:
                answer = make_plan(asked.question(model, None), progress)
    except UnsupportedModelError as problem:
        if output is not None or calibrating is not None:
            raise
        from haversack.cli.native import print_native

        return print_native(asked.question(model, None), str(problem), json=json)
    if output is not None and answer.fits:
        write_plan(answer, output)  # before anything is printed: whoever reads that may leave early
    with console.reader_may_leave():
        _print(model, answer, asked.machine, wanted)
    if output is not None and not answer.fits:
        write_plan(answer, output)
    return 0 if answer.fits else 1


def _print(model: Model, answer: Answer, machine: str | None, wanted: Wanted) -> None:
    rows = serving_rows(model, answer, machine) if wanted.operators or wanted.json else []
    money = None
    if machine is not None or wanted.prices is not None:
        money = price_line(machine or "this machine", wanted.prices, _seconds_per_generated(answer))
    if wanted.json:
        console.print_json({**plan_json(answer), "operators": operators_json(rows), "per_million_tokens": money})
        return
    print_answer(answer)
    if model.num_experts:
        active = format_count(model.num_active_parameters)
        console.paragraph(f"{active} of the parameters are active for a token; all experts are resident.")
    if money is not None:
        console.paragraph(f"per million generated tokens: {money}.")
    if wanted.operators:
        typer.echo("")
        print_operators(rows)


def write_plan(answer: Answer, output: Path) -> None:
    """Write a plan file whole or not at all. Raises DoesNotFitError for a plan that does not fit."""
    from haversack.formats.output import write_whole

    write_whole(output, answer.require_fit().to_json())


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
