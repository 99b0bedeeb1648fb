"""`haversack export`: a packed folder written for other tools."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from haversack.cli import console
from haversack.units import format_bytes


def export(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A packed folder.")],
    form: Annotated[str, typer.Option("--format", help="compressed-tensors (a folder) or gguf (a file).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder or file to write.")],
    otherwise: Annotated[
        int, typer.Option("--otherwise", help="Bits of sites whose option the format can't say: 8, or 16 as they are.")
    ] = 8,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Write a packed folder for transformers and vLLM (compressed-tensors) or llama.cpp (GGUF), naming what had to change."""
    from haversack.jobs.export import export as export_job

    with console.progress_bar(quiet=json) as progress:
        done = export_job(source, output, form, otherwise_bits=otherwise, progress=progress)
    if json:
        changes = [asdict(change) for change in done.changes]
        facts = {"output": str(done.path), "format": form, "bytes": done.num_bytes}
        console.print_json({**facts, "changes": changes, "notes": list(done.notes)})
        return 0
    typer.echo(f"Wrote {done.path}: {format_bytes(done.num_bytes)}.")
    if done.changes:
        typer.echo(f"\nWhat {form} could not say as the plan says it ({len(done.changes)} places):")
        for change in done.changes:
            typer.echo(f"  {change}")
    console.notes(done.notes)
    return 0
