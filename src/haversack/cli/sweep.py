"""What `haversack plan --sweep` prints and draws: one number of the workload varied, up to the first that does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from haversack.cli import console
from haversack.errors import UsageError
from haversack.units import format_bytes, format_count, format_rate

if TYPE_CHECKING:
    from haversack.plan.sweep import ModelFit, SweepPoint

UNITS = {"context": "tokens", "users": "users", "batch": "sequences"}


def check_picture(output: Path | None) -> None:
    """Raises UsageError unless `output` is an SVG file's name, and OutputError where it can't be written."""
    if output is None:
        return
    if output.suffix != ".svg":
        raise UsageError(
            f"--sweep draws an SVG picture, but --output is {str(output)!r}; name a file that ends in .svg."
        )
    from haversack.formats.output import check_output_file

    check_output_file(output)


def print_sweep(
    points: Iterable[SweepPoint], what: str, *, budget_bytes: int | None, output: Path | None, json: bool
) -> int:
    """Print and draw; 0 if any value fits, 1 if none does."""
    found = list(points)
    if output is not None:
        from haversack.formats.output import write_whole
        from haversack.report.sweep import sweep_picture

        write_whole(output, sweep_picture(found, UNITS[what], budget_bytes))
    if json:
        rows = [
            {
                what: point.value,
                "fits": point.fits,
                "peak_bytes": point.peak_bytes,
                "peak_time_point": point.point,
                "owners": dict(point.owners),
                "tokens_per_second": point.tokens_per_second,
            }
            for point in found
        ]
        console.print_json({"sweep": what, "budget_bytes": budget_bytes, "points": rows})
    else:
        lines = [
            (
                f"{point.value:,}",
                format_bytes(point.peak_bytes),
                point.point,
                "yes" if point.fits else "no",
                format_rate(point.tokens_per_second) if point.tokens_per_second else "unknown",
            )
            for point in found
        ]
        console.table((what, "peak", "at", "fits", "tokens/s at most"), lines, right=(0, 1, 4))
    return 0 if any(point.fits for point in found) else 1


def print_largest(name: str, what: str, value: int | None, *, json: bool) -> int:
    """Print the largest value; 0 if there is one."""
    if json:
        console.print_json({"largest": what, "value": value})
    else:
        found = f"{value:,} {UNITS[what]}" if value is not None else "none"
        console.paragraph(f"{name}: largest {what} that fits: {found}.")
    return 0 if value is not None else 1


def print_largest_model(fits: Sequence[ModelFit], *, json: bool) -> int:
    """Print which of several models (largest first) fit, and the largest; 0 if any does."""
    found = next((fit.name for fit in fits if fit.fits), None)
    if json:
        console.print_json({"largest": "model", "value": found, "models": [dataclasses.asdict(fit) for fit in fits]})
    else:
        console.paragraph(f"largest model that fits: {found or 'none'}.")
        rows = [
            (fit.name, format_count(fit.num_parameters), format_bytes(fit.peak_bytes), "yes" if fit.fits else "no")
            for fit in fits
        ]
        console.table(("model", "parameters", "peak", "fits"), rows, right=(1, 2))
    return 0 if found is not None else 1
