"""`haversack pack`: apply a plan and write a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from haversack.cli import console
from haversack.cli.plan import plan_json, print_answer
from haversack.cli.question import (
    Asked,
    BudgetOption,
    CalibrationFile,
    CalibrationTokens,
    Context,
    Evaluations,
    GenerateTokens,
    MachineName,
    MaxDamage,
    MinSpeed,
    Placement,
    PromptTokens,
    Source,
    TensorBudget,
    Trust,
    Users,
    calibration_for,
    meter_for,
)
from haversack.units import format_bytes


def pack(
    model: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    budget: BudgetOption = None,
    tensor_budget: TensorBudget = None,
    max_damage: MaxDamage = None,
    context: Context = None,
    prompt_tokens: PromptTokens = None,
    generate_tokens: GenerateTokens = None,
    users: Users = 1,
    min_tokens_per_second: MinSpeed = None,
    placement: Placement = "auto",
    machine: MachineName = None,
    calibration: CalibrationFile = None,
    calibration_tokens: CalibrationTokens = 32_768,
    evaluations: Evaluations = None,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Execute this plan instead of making one.")] = None,
    trust_remote_code: Trust = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Calibrate MODEL, choose an option for every place in it, and pack it. Interrupt it and run it again: it goes on."""
    from haversack.describe.model import describe_model
    from haversack.errors import CheckpointError, OutputError
    from haversack.jobs.pack import pack as pack_job
    from haversack.plan.make import make_plan
    from haversack.plan.schema import Plan

    if output.exists():
        raise OutputError(f"{output} exists already; choose another output or remove it first.")
    described = describe_model(model, trust_remote_code=trust_remote_code)
    if described.folder is None:
        raise CheckpointError(
            f"{model} has no weights here; packing needs them, so name a folder with safetensors files."
        )
    asked = Asked(
        budget, tensor_budget, max_damage, context, prompt_tokens, generate_tokens, users, min_tokens_per_second,
        placement, machine,
    )  # fmt: skip
    with console.progress_bar(quiet=json) as progress:
        answer, found = None, None
        if plan_file is not None:
            made = Plan.read(plan_file)
            tokens = made.workload["prompt_tokens"] + made.workload["generate_tokens"]
            if not all(is_neutral(row.option) for row in made.weights):
                found = calibration_for(described, calibration, calibration_tokens, tokens, progress)
        else:
            answer = make_plan(asked.question(described, None, lossless=True), progress)
            if not answer.fits:  # something must be lost: find out where it hurts least
                tokens = asked.workload(described).context_tokens
                found = calibration_for(described, calibration, calibration_tokens, tokens, progress)
                meter = meter_for(found, evaluations, progress)
                answer = make_plan(asked.question(described, found), progress, meter)
            made = answer.require_fit()
        statistics = None if found is None else found.statistics
        folder, notes = pack_job(described, made, output, statistics=statistics, progress=progress)
    notes = (*(() if found is None else found.notes), *notes)
    if json:
        report = {"folder": str(folder.path), "notes": list(notes)}
        console.print_json(report | ({} if answer is None else plan_json(answer)))
        return 0
    if answer is not None:
        print_answer(answer)
    for note in notes:
        typer.echo(f"note: {note}.")
    size = sum(entry.num_bytes for entry in folder.manifest.files.values())
    typer.echo(f"\nPacked into {folder.path}: {format_bytes(size)} on disk.")
    typer.echo(f"Next: haversack run {folder.path} --prompt '...'   or   haversack verify {folder.path}")
    return 0


def is_neutral(option: dict) -> bool:
    """Whether an option of a plan changes nothing."""
    return not option
