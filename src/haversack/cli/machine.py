"""`haversack machine`: what this machine has, and its rates, measured once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from haversack.cli import console
from haversack.units import format_bytes


def machine(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A named machine; this one if left out.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine's rates (about a minute, best on an idle machine).")
    ] = False,
    kernels: Annotated[
        Path | None,
        typer.Option(
            "--kernels",
            metavar="DIR",
            help="Measure which kernels are fastest for a packed folder's matrices, and keep it.",
        ),
    ] = None,
    names: Annotated[bool, typer.Option("--names", help="List the machines that have a name.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Show a machine as plans see it: memory, and the rates that seconds are predicted from."""
    from haversack.describe import machine as machines
    from haversack.errors import UsageError

    if names:
        listed = machines.machine_names()
        console.print_json(list(listed)) if json else typer.echo("\n".join(listed))
        return 0
    if name is not None and measure:
        raise UsageError(f"--measure measures this machine, but {name!r} was named; leave one of them out.")
    if kernels is not None:
        if name is not None or measure:
            raise UsageError(
                "--kernels measures this machine's kernels alone; leave --measure and the machine's name out."
            )
        return _measure_kernels(kernels, json)
    if measure:
        found = machines.measured(remeasure=True, progress=lambda line: typer.echo(line, err=True))
    else:
        found = machines.known() if name is None else machines.named(name)
    if json:
        console.print_json(found.to_dict())
        return 0
    typer.echo(found.describe())
    rates = found.rates
    rows = [(f"memory read, {n} threads", f"{rate / 1e9:.3g} GB/s") for n, rate in rates.read_bytes_per_second.items()]
    for dtype, by_threads in rates.matmul_flops_per_second.items():
        rows += [(f"{dtype} matmul, {n} threads", f"{rate / 1e9:.4g} GFLOP/s") for n, rate in by_threads.items()]
    if rates.disk_read_bytes_per_second is not None:
        rows.append((f"disk read ({rates.disk_read_method})", f"{rates.disk_read_bytes_per_second / 1e9:.3g} GB/s"))
    if rates.runtime_private_bytes is not None:
        rows.append(("runtime after imports", format_bytes(rates.runtime_private_bytes)))
    if rows:
        console.table(("rate", "measured"), rows)
    elif not found.devices:
        typer.echo("Nobody measured its rates yet; `haversack machine --measure` does, in about a minute.")
    for note in (*found.notes, *rates.notes):
        typer.echo(f"note: {note.rstrip('.')}.")
    return 0


def _measure_kernels(folder: Path, json: bool) -> int:
    from haversack.jobs.measure_kernels import measure_kernels

    with console.progress_bar(quiet=json) as progress:
        report = measure_kernels(folder, progress=progress)
    if json:
        console.print_json(report)
        return 0
    rows = []
    for case in report["cases"]:
        times, first = case["microseconds"], case["unmeasured"]
        gain = (
            "as without measuring"
            if case["kernel"] == first
            else f"{times[case['kernel']]:.0f} us for {times[first]:.0f}"
        )
        words = (case["form"], case["columns"], case["tokens"], case["kernel"], case["threads"] or "all", gain)
        rows.append(tuple(str(word) for word in words))
    console.table(("form", "columns", "tokens", "kernel", "threads", "gain"), rows, right=(1, 2, 4))
    typer.echo(f"Kept in {report['file']}; runs on this machine use it from now on.")
    return 0
