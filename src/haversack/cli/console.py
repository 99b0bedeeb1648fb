"""What verbs print: tables in the width there is, progress with time left, errors on one line."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer

from haversack.cli.tables import table_lines

if TYPE_CHECKING:
    from haversack.ledger import Ledger

Progress = Callable[[str, int, int], None]
"""`progress(what, done, total)`: called by jobs as they go; `total` 0 means unknown."""

PIPED_COLUMNS = 80


def error(message: str, details: str | None = None) -> None:
    """One sentence on standard error."""
    typer.echo(f"haversack: {message}" + (f" {details}" if details else ""), err=True)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Within, a reader that closes the pipe (`| head`) ends the printing and not the verb, whose exit code is an answer."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        leave_closed_pipe()


def leave_closed_pipe() -> None:
    """Whoever read our output has left. Python flushes once more on exit, which must then go nowhere."""
    with suppress(OSError, ValueError):  # there may be no file behind standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(data: Any) -> None:
    """JSON on standard output, for machines. Only finite numbers are JSON; others would be a defect."""
    typer.echo(json.dumps(data, indent=1, default=str, allow_nan=False))


def width() -> int:
    """Columns to write in: the terminal's (or what COLUMNS says), and at most 80 where there is none."""
    columns = shutil.get_terminal_size().columns
    return columns if _is_terminal() else min(columns, PIPED_COLUMNS)


def paragraph(text: str, *, indent: str = "", err: bool = False) -> None:
    """Text wrapped between words; continued lines begin with `indent`."""
    filled = textwrap.fill(text, width(), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    typer.echo(filled, err=err)


def notes(sentences: Sequence[str], *, err: bool = False) -> None:
    """What a user should know beside the figures, or, on standard error, beside a text."""
    for sentence in sentences:
        paragraph(f"note: {sentence.rstrip('.')}.", indent="  ", err=err)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Collection[int] = ()) -> None:
    """A table; cells of the columns `right` are numbers, aligned right. The heading is bold where that can be seen."""
    heading, lines = table_lines(columns, [[str(cell) for cell in row] for row in rows], width(), right)
    for line in heading:
        typer.echo(typer.style(line, bold=True) if _has_styles() else line)
    for line in lines:
        typer.echo(line)


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _has_styles() -> bool:
    """Whether standard output shows bold text: a terminal that nobody asked to go without (https://no-color.org)."""
    return _is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def ledger_table(ledger: Ledger, *, besides: Sequence[str] = ()) -> None:
    """Bytes by owner and time point; tiers other than the device's are named. Of the time points `besides`, a line says
    the total."""
    from haversack.units import format_bytes

    points = [point for point in ledger.timeline if point not in besides]
    owners = list(dict.fromkeys(owner for point in points for owner in ledger.timeline[point]))
    rows = []
    for owner in owners:
        for tier in sorted({tier for point in points for tier in ledger.timeline[point].get(owner, {})}):
            cells = [ledger.timeline[point].get(owner, {}).get(tier, 0) for point in points]
            name = owner if tier == "device" else f"{owner} [{tier}]"
            rows.append([name, *(format_bytes(n) if n else "-" for n in cells)])
    rows.append(["total in memory", *(format_bytes(ledger.total_bytes(point)) for point in points)])
    table(("bytes", *points), rows, right=range(1, len(points) + 1))
    if totals := [
        f"{point} {format_bytes(ledger.total_bytes(point))}" for point in besides if point in ledger.timeline
    ]:
        paragraph(f"besides: {', '.join(totals)}.")


def passing_line(what: str) -> None:
    """What is being done, on a terminal's standard error, in place of the line before; an empty one takes it away."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{what + ' ...' if what else ''}")
        sys.stderr.flush()


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress]:
    """A progress bar with time left on a terminal's standard error; silent under pipes or when `quiet`."""
    if quiet or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    tasks: dict[str, Any] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total or None)
        bar.update(tasks[what], completed=done, total=total or None)

    with bar:
        yield progress


@contextmanager
def status(text: str) -> Iterator[None]:
    """Say what is being waited for while it lasts, on a terminal's standard error only."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield
