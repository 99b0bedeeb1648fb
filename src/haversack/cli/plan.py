"""`haversack plan`: does it fit, what will it cost, what do I lose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from haversack.cli import console
from haversack.cli.answer import plan_json, print_answer
from haversack.cli.money import operators_json, price_line, print_operators
from haversack.cli.question import Asked, Calibrating, Source, Trust, machine_named, spread_options, weighed_answer
from haversack.cli.sweep import check_picture, print_largest, print_sweep
from haversack.errors import UnsupportedModelError, UsageError
from haversack.units import format_count

if TYPE_CHECKING:
    from haversack.cost.roofline import Operator
    from haversack.describe.model import Model
    from haversack.plan.question import Answer, Question

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
    if mix and (task != "serve" or sweep or largest or output or asked.says_anything):
        raise UsageError("--mix goes with --prices and --json alone: machines are what is asked for.")
    if task != "serve" and output is not None and sweep is None:
        raise UsageError("--output writes plans that serve; --task tune and train are printed, or given by --json.")
    if task != "serve" and asked.recipe:
        raise UsageError("--recipe restricts plans that serve; leave it out with --task tune and train.")
    if task == "serve" and settings:
        raise UsageError("--with is for --task tune and train; serving has options of its own.")
    if task == "serve" and not mix:
        asked.check()
    weighed = calibrate or calibrating.calibration is not None
    if weighed and (sweep is not None or largest is not None):
        raise UsageError("--sweep and --largest cite damages; leave --calibrate and --calibration out.")
    if calibrating.calibration is not None:
        calibrating.text()  # read before the model, so that a wrong file is said at once
    if output is not None and sweep is None:
        from haversack.formats.output import check_output_file

        check_output_file(output)

    from haversack.cli.lean import plan_alone
    from haversack.describe.model import describe_model

    if not weighed:
        plan_alone()
    described = describe_model(model, trust_remote_code=trust_remote_code)
    if mix:
        from haversack.cli.money import fleet_verb

        return fleet_verb(described, mix, prices, json=json)
    if task != "serve":
        from haversack.cli.training import plan_training_verb

        return plan_training_verb(
            described,
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
    if sweep is not None or largest is not None:
        return _vary(asked.question(described, None), sweep, largest, output, json=json)
    return _plan_serving(described, asked, calibrating if weighed else None, output, operators, prices, json=json)


def _vary(question: Question, sweep: str | None, largest: str | None, picture: Path | None, *, json: bool) -> int:
    """Answer --sweep, or --largest."""
    from haversack.plan.sweep import largest_served, sweep_serving

    if sweep is not None:
        points = sweep_serving(question, sweep)
        return print_sweep(points, sweep, budget_bytes=question.budget_bytes, output=picture, json=json)
    assert largest is not None
    return print_largest(question.model.name, largest, largest_served(question, largest), json=json)


def _plan_serving(
    model: Model,
    asked: Asked,
    calibrating: Calibrating | None,
    output: Path | None,
    operators: bool,
    prices: Path | None,
    *,
    json: bool,
) -> int:
    """Plan, write the plan where it fits, and print the answer. Without `calibrating`, damages are cited."""
    from haversack.plan.make import make_plan

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
        _print(model, answer, asked.machine, operators, prices, json=json)
    if output is not None and not answer.fits:
        write_plan(answer, output)
    return 0 if answer.fits else 1


def _print(
    model: Model, answer: Answer, machine: str | None, operators: bool, prices: Path | None, *, json: bool
) -> None:
    rows = serving_rows(model, answer, machine) if operators or json else []
    money = None
    if machine is not None or prices is not None:
        money = price_line(machine or "this machine", prices, _seconds_per_generated(answer))
    if json:
        console.print_json({**plan_json(answer), "operators": operators_json(rows), "per_million_tokens": money})
        return
    print_answer(answer)
    if model.num_experts:
        active = format_count(model.num_active_parameters)
        console.paragraph(f"{active} of the parameters are active for a token; all experts are resident.")
    if money is not None:
        console.paragraph(f"per million generated tokens: {money}.")
    if operators:
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
