"""`haversack verify`: run the planned workload in a fresh process and show predicted against measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from haversack.cli import console
from haversack.units import format_bytes


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A packed folder.")],
    quality: Annotated[
        bool, typer.Option("--quality/--no-quality", help="Also measure perplexity and KL against the unpacked model.")
    ] = True,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="Of a folder packed with --elastic: as much of it as this holds, 2GiB, or 60% of available memory.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Run the planned workload and compare with what was promised. Exits 1 if the measured peak passes the budget."""
    from haversack.jobs.verify import verify as verify_job

    with console.progress_bar(quiet=json) as progress:
        report = verify_job(folder, quality=quality, budget=budget, progress=progress)
    with console.reader_may_leave():
        console.print_json(report) if json else _print(report)
    return 0 if report["within_budget"] else 1


def _print(report: dict[str, Any]) -> None:
    console.table(
        ("bytes", "predicted", "measured", "difference"),
        [(row["what"], *_sizes(row)) for row in report["bytes"]],
        right=(1, 2, 3),
    )
    typer.echo("")
    console.table(("figure", "predicted", "measured"), [tuple(row.values()) for row in report["figures"]])
    console.notes(report["notes"])
    verdict = "kept" if report["within_budget"] else "BROKEN"
    typer.echo("")
    console.paragraph(
        f"The budget was {verdict}. Prediction {report['prediction_hash'][:16]}, made before anything was loaded."
    )


def _sizes(row: dict) -> tuple[str, str, str]:
    predicted, measured = row["predicted"], row["measured"]
    if predicted is None:
        return "-", format_bytes(measured), "-"
    if measured is None:
        return format_bytes(predicted), "-", "-"
    gap = measured - predicted
    share = f" ({gap / predicted:+.1%})" if predicted and gap else ""
    return format_bytes(predicted), format_bytes(measured), f"{gap:+,} B{share}" if gap else "equal"
