"""`haversack run`: generate from a packed folder, under a cap if asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from haversack.cli import console
from haversack.errors import UsageError
from haversack.units import format_bytes


def run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A packed folder.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to continue; standard input if left out.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="At most; as planned if left out.")
    ] = None,
    cap: Annotated[
        str | None,
        typer.Option("--cap", help="A hard limit on this process's private memory (RLIMIT_DATA), e.g. 2GiB."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON when done, instead of streaming.")] = False,
) -> int:
    """Continue a prompt, streaming tokens as they come."""
    from haversack.jobs.run import generate
    from haversack.units import parse_bytes

    cap_bytes = None if cap is None else parse_bytes(cap)
    try:
        text = prompt if prompt is not None else sys.stdin.read()
    except UnicodeDecodeError:
        raise UsageError("standard input is not text (it is not UTF-8); pipe a plain text in.") from None

    shown = ""

    def stage(what: str) -> None:
        """A line on a terminal that each stage, and then the text, takes the place of."""
        nonlocal shown
        if not json and sys.stderr.isatty():
            sys.stderr.write(f"\r{what + ' ...' if what else '':{len(shown)}}" + ("" if what else "\r"))
            sys.stderr.flush()
            shown = what + " ..."

    def show(piece: str) -> None:
        nonlocal shown
        if not json:
            if shown:
                stage("")
                shown = ""
            sys.stdout.write(piece)
            sys.stdout.flush()

    result = generate(
        folder,
        text,
        max_new_tokens=max_new_tokens,
        cap_bytes=cap_bytes,
        on_text=show,
        on_stage=stage,
    )
    if json:
        console.print_json(result)
        return 0
    typer.echo("")
    typer.echo(
        f"[{result['prompt_tokens']} prompt and {result['new_tokens']} new tokens; first after "
        f"{result['seconds_to_first_token']:.2f} s, then {result['tokens_per_second']:.1f} tokens/s by "
        f"{'the compiled step' if result['loop_reason'] is None else 'transformers'}; peak "
        f"{format_bytes(result['peak_private_bytes'])} private]",
        err=True,
    )
    return 0
