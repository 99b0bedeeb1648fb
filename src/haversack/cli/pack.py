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
        if plan_file is not None:
            made, answer = Plan.read(plan_file), None
            tokens = made.workload["prompt_tokens"] + made.workload["generate_tokens"]
        else:
            tokens = asked.workload(described).context_tokens
        found = calibration_for(described, calibration, calibration_tokens, tokens, progress)
        if plan_file is None:
            answer = make_plan(asked.question(described, found), progress, meter_for(found, evaluations, progress))
            made = answer.require_fit()
        folder, notes = pack_job(described, made, output, statistics=found.statistics, progress=progress)
    if json:
        report = {"folder": str(folder.path), "notes": [*found.notes, *notes]}
        console.print_json(report | ({} if answer is None else plan_json(answer)))
        return 0
    if answer is not None:
        print_answer(answer)
    for note in (*found.notes, *notes):
        typer.echo(f"note: {note}.")
    size = sum(entry.num_bytes for entry in folder.manifest.files.values())
    typer.echo(f"\nPacked into {folder.path}: {format_bytes(size)} on disk.")
    typer.echo(f"Next: haversack run {folder.path} --prompt '...'   or   haversack verify {folder.path}")
    return 0
