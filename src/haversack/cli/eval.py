"""`haversack eval kv`: what cache policies lose on probes, on any model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from haversack.cli import console
from haversack.units import format_bytes

app = typer.Typer(help="Measure what a method loses.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Measure what a method loses."""


@app.command()
def kv(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model folder, packed or not.")],
    policies: Annotated[
        list[str] | None,
        typer.Option(
            "--kv", metavar="POLICY", help="A recipe, `all`, or `plan` (a packed folder's own); may be repeated."
        ),
    ] = None,
    num_bytes: Annotated[
        str | None,
        typer.Option("--bytes", help="What every recipe may fill: 25% of the whole 16-bit cache, or 2MiB."),
    ] = None,
    context: Annotated[int | None, typer.Option("--context", help="Tokens of each probe's context.")] = None,
    probes: Annotated[int, typer.Option("--probes", help="Of each kind.")] = 4,
    text: Annotated[
        Path | None, typer.Option("--text", help="The text around needles; foreign prose if left out.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Ask needles, lists, records and text of a compressed cache, and compare with a whole one."""
    from haversack.errors import UsageError
    from haversack.jobs.eval_kv import evaluate_caches

    if text is not None and not text.is_file():
        raise UsageError(f"there is no text file {str(text)!r}; name one, or leave --text out.")
    with console.progress_bar(quiet=json) as progress:
        report = evaluate_caches(
            folder,
            policies=policies or (),
            num_bytes=num_bytes,
            context_tokens=context,
            num_per_kind=probes,
            text=None if text is None else text.read_text(encoding="utf-8", errors="replace"),
            progress=progress,
        )
    if json:
        console.print_json(report)
        return 0
    for row in sorted(report["policies"], key=lambda row: row["worst_kl"]):
        _show(row)
    whole = format_bytes(report["whole_cache_bytes"])
    console.notes(
        [
            f"a whole 16-bit cache of {report['cache_tokens']} tokens takes {whole}; KL is in nats per answer token against it, with the same weights",
            "`before`: the question was read ahead of the context too",
            *(f"{row['policy']} was left out: {row['why']}" for row in report["left_out"]),
        ]
    )
    return 0


def _show(row: dict[str, Any]) -> None:
    held = f"{format_bytes(row['held_bytes'])}, {row['share_of_whole']:.1%} of the whole"
    if row["filed_bytes"]:
        held += f", and {format_bytes(row['filed_bytes'])} in files"
    console.paragraph(f"{row['policy']}: {row['label']}", indent="  ")
    console.paragraph(f"  held {held}; worst {row['worst_kl']:.4g} nats ({row['worst_probe']})", indent="  ")
    rows = []
    for kind, ways in row["probes"].items():
        cells = [kind]
        for asked in ("after", "before"):
            figures = ways.get(asked)
            exact = "-" if figures is None or figures["exact"] is None else f"{figures['exact']:.0%}"
            cells += ["-" if figures is None else f"{figures['kl']:.4g}", exact]
        rows.append(cells)
    columns = ("probe", "KL after", "exact", "KL before", "exact")
    console.table(columns, rows, right=(1, 2, 3, 4))
    typer.echo("")
