"""`haversack pack`: apply a plan and write a folder that transformers loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from haversack.cli import console
from haversack.cli.answer import plan_json, print_answer
from haversack.cli.question import (
    Asked,
    Calibrating,
    Source,
    Trust,
    answer_for_all_sizes,
    spread_options,
    weighed_answer,
)
from haversack.describe.workload import ServeWorkload
from haversack.errors import UsageError
from haversack.units import format_bytes

if TYPE_CHECKING:
    from haversack.describe.model import Model
    from haversack.plan.schema import Elastic, Plan


@spread_options
def pack(
    model: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    asked: Asked,
    calibrating: Calibrating,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Execute this plan instead of making one.")] = None,
    retune: Annotated[
        int,
        typer.Option(
            help="Passes over the calibration text that tune scales and norms together; needs room for the model."
        ),
    ] = 0,
    elastic: Annotated[
        bool,
        typer.Option(
            "--elastic",
            help="One folder for any budget between a floor and --budget (or all there is): run, verify and loading take a budget.",
        ),
    ] = False,
    trust_remote_code: Trust = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Calibrate MODEL, choose an option for every place in it, and pack it. Interrupt it and run it again: it goes on."""
    from haversack.describe.model import describe_model
    from haversack.errors import OutputError
    from haversack.formats.output import check_output
    from haversack.jobs.pack import check_belongs, check_packable, retune_plan, unfinished
    from haversack.jobs.pack import pack as pack_job
    from haversack.plan.question import Answer
    from haversack.plan.schema import Plan

    if output.exists():
        raise OutputError(f"{output} exists already; choose another output or remove it first.")
    check_output(output)
    calibrating.text()
    ready = None
    if plan_file is not None:
        if asked.says_anything:
            raise UsageError(
                "--plan was given with a budget, a length or a bound, but the plan says them already; leave one out."
            )
        ready = Plan.read(plan_file)
    else:
        asked.check(elastic=elastic)
    if elastic:
        _check_elastic(asked, plan_file, retune)
    described = describe_model(model, trust_remote_code=trust_remote_code)
    if described.folder is None:
        if ready is None and asked.budget_text is not None and not elastic:
            _refuse_hopeless(asked, described, json)  # before gigabytes are fetched
        described = _with_weights(model, described, trust_remote_code=trust_remote_code, quiet=json)
    if ready is not None:
        check_belongs(ready, described)
    if (left := unfinished(described, output)) is not None:
        _check_same_question(left, None if plan_file else asked, ready, described, output, elastic)
        ready = left
    check_packable(described, trust_remote_code=trust_remote_code)

    with console.progress_bar(quiet=json) as progress:
        found = None
        if ready is not None:
            answer = Answer(ready, fits=True, shortfall_bytes=0)
            if ready.elastic is not None:
                found = calibrating.statistics(described, progress)
            elif not all(is_lossless(row.option) for row in ready.weights):
                context_tokens = ServeWorkload.from_dict(ready.workload).context_tokens
                found = calibrating.run(described, context_tokens, progress, ready.recipes)
        else:
            weigh = answer_for_all_sizes if elastic else weighed_answer
            answer, found = weigh(asked, described, calibrating, progress)
            if json and not answer.fits:
                with console.reader_may_leave():
                    console.print_json(plan_json(answer))
        statistics = None if found is None else found.statistics
        plan, retuned = answer.require_fit(), None
        if retune and found is not None:
            retuned = retune_plan(described, plan, found, retune, progress)
        packed = None if found is None else found.packed
        folder, notes = pack_job(
            described, plan, output, statistics=statistics, retuned=retuned, packed=packed, progress=progress
        )
    notes = (*(() if found is None else found.notes), *notes)
    if retuned is not None:
        notes = (*notes, f"scales and norms tuned: {retuned.before:.4g} to {retuned.after:.4g} nats on text held back")
    if json:
        console.print_json({"folder": str(folder.path), "notes": list(notes), **plan_json(answer)})
        return 0
    print_answer(answer)
    console.notes(notes)
    size = sum(entry.num_bytes for entry in folder.manifest.files.values())
    typer.echo(f"\nPacked into {folder.path}: {format_bytes(size)} on disk.")
    if plan.elastic is not None:
        console.paragraph(_sizes(plan.elastic, plan))
        typer.echo(f"Next: haversack run {folder.path} --budget ... --prompt '...'")
        return 0
    typer.echo(f"Next: haversack run {folder.path} --prompt '...'   or   haversack verify {folder.path}")
    return 0


def _check_elastic(asked: Asked, plan_file: Path | None, retune: int) -> None:
    """Raise UsageError for what a folder of all sizes can't be given."""
    from haversack.plan.elastic import stacked_option

    for name, given in (("--plan", plan_file), ("--retune", retune)):
        if given:
            raise UsageError(f"{name} was given with --elastic, but belongs to one size; leave one of both out.")
    stacked_option(asked.recipes)


def _sizes(elastic: Elastic, plan: Plan) -> str:
    """Floor, ceiling and steps in one sentence."""
    largest = max((block.num_bytes for block in elastic.blocks), default=0)
    return (
        f"It can be held at any peak from {format_bytes(elastic.floor_peak_bytes)} ({elastic.floor_damage:.3g} nats per token, proxied) to "
        f"{format_bytes(plan.prediction.peak_bytes)}, in {len(elastic.blocks)} blocks of at most {format_bytes(largest)}."
    )


def _refuse_hopeless(asked: Asked, described: Model, json: bool) -> None:
    """Raise DoesNotFitError if no options at all fit this model."""
    from haversack.plan.make import hopeless

    answer = hopeless(asked.question(described, None))
    if answer is not None:
        if json:
            with console.reader_may_leave():
                console.print_json(plan_json(answer))
        answer.require_fit()


def _with_weights(source: str, described: Model, *, trust_remote_code: bool, quiet: bool) -> Model:
    """The model with its weights, from the hub if that is where it is. Raises CheckpointError where there are none."""
    from haversack.describe.hub import fetch_weights
    from haversack.describe.model import describe_model
    from haversack.errors import CheckpointError

    if described.hub_id is None:
        raise CheckpointError(
            f"{source} has no weights here; packing needs them, so name a folder with safetensors files."
        )
    fetch_weights(described.hub_id, described.revision, quiet=quiet or not sys.stderr.isatty())
    found = describe_model(described.hub_id, revision=described.revision, trust_remote_code=trust_remote_code)
    if found.folder is None:
        raise CheckpointError(f"{source} has no safetensors files on the hub; packing needs them, so choose another.")
    return found


def _check_same_question(
    left: Plan, asked: Asked | None, given: Plan | None, model: Model, output: Path, elastic: bool
) -> None:
    """Raise OutputError unless an unfinished pack's plan answers what is asked now.

    A percentage may have come to other bytes since: the plan still answers if it fits today's.
    """
    from haversack.errors import OutputError
    from haversack.formats.packed_folder import partial_path

    if asked is None:
        same = given == left
    else:
        question, budget = asked.question(model, None), left.budget
        is_percentage = (asked.budget_text or "").strip().endswith("%")
        fits_still = is_percentage and left.prediction.peak_bytes <= (question.budget_bytes or 0)
        same = (
            (budget.num_bytes == question.budget_bytes or fits_still)
            and left.workload == question.workload.to_dict()
            and budget.kind == question.budget_kind
            and budget.max_damage == question.max_damage
            and left.recipes == question.recipes
            and (left.elastic is not None) == elastic
        )
    if not same:
        size = "the fewest bytes" if left.budget.num_bytes is None else format_bytes(left.budget.num_bytes)
        workload = left.workload
        raise OutputError(
            f"{partial_path(output)} was left by an interrupted pack of this model by another plan ({size}, "
            f"{workload['users']} x ({workload['prompt_tokens']} + {workload['generate_tokens']}) tokens); repeat that "
            "command to go on with it, or remove the folder."
        )


def is_lossless(option: dict) -> bool:
    """Whether an option of a plan changes nothing, so that no statistics are needed for it."""
    from haversack.parts.weights.base import WeightOption

    return WeightOption.from_dict(option).lossless
