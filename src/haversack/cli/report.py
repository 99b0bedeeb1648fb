"""`haversack report`: the page that shows a packed folder's plan, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from haversack.cli import console


def report(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A packed folder, or a plan file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Draw one self-contained page: bytes against the budget, bits per site, what was given up and why."""
    from haversack.report.page import write_report

    page = write_report(source, output)
    if json:
        console.print_json({"source": str(source), "report": str(page), "bytes": page.stat().st_size})
    else:
        typer.echo(f"Wrote {page}.")
    return 0
