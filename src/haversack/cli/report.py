"""`haversack report`: the page that shows a packed folder's plan, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A packed folder, or a plan file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
) -> int:
    """Draw one self-contained page: bytes against the budget, bits per site, what was given up and why."""
    from haversack.report.page import write_report

    typer.echo(f"Wrote {write_report(source, output)}.")
    return 0
