"""`haversack run`: generate from a packed folder, or chat with it, under a cap if asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from haversack.cli import console
from haversack.cli.chat import converse, show
from haversack.engine.choice import Choice
from haversack.errors import UsageError
from haversack.units import format_bytes


def run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A packed folder.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to continue; standard input if left out.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Several turns, with the folder's chat template.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="With --chat: what the model is told first.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="At most, of each answer; as planned if left out.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 is greedy; the model's own setting if left out.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Draw from the likeliest tokens up to this sum.")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Draw from this many likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the draws, to have them again.")] = None,
    cap: Annotated[
        str | None,
        typer.Option(
            "--cap",
            help="A hard limit on this process's private memory (RLIMIT_DATA), 2GiB, or 60% of available memory.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="Of a folder packed with --elastic: as much of it as this holds, 2GiB, or 60% of available memory.",
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON when done (with --chat: a line per turn) instead of streaming.")
    ] = False,
) -> int:
    """Continue a prompt, or chat, streaming tokens as they come."""
    if chat and prompt is not None:
        raise UsageError("--chat reads messages from the terminal or from standard input; leave --prompt out.")
    if system is not None and not chat:
        raise UsageError("--system was given without --chat; a plain prompt is continued as it is, so put it there.")
    cap_bytes = None if cap is None else _cap_bytes(cap)
    choice = Choice(temperature, top_p, top_k, seed)
    if chat:
        return converse(folder, system, max_new_tokens, choice, cap_bytes, budget, json=json)
    return _complete(folder, _text(prompt), max_new_tokens, choice, cap_bytes, budget, json=json)


def _cap_bytes(text: str) -> int:
    from haversack.describe import machine
    from haversack.units import parse_budget

    return parse_budget(text, machine.detect().available_bytes)


def _text(prompt: str | None) -> str:
    """The prompt, or what is piped in."""
    if prompt is not None:
        return prompt
    if sys.stdin.isatty():
        typer.echo("Type the prompt, then Ctrl-D.", err=True)
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise UsageError("standard input is not text (it is not UTF-8); pipe a plain text in.") from None


def _complete(
    folder: Path,
    text: str,
    max_new_tokens: int | None,
    choice: Choice,
    cap_bytes: int | None,
    budget: str | None,
    *,
    json: bool,
) -> int:
    from haversack.jobs.run import generate

    result = generate(
        folder,
        text,
        max_new_tokens=max_new_tokens,
        choice=choice,
        cap_bytes=cap_bytes,
        budget=budget,
        on_text=None if json else show,
        on_stage=None if json else console.passing_line,
    )
    code = 130 if result["finish"] == "interrupted" else 0
    if json:
        console.print_json(result)
        return code
    typer.echo("")
    typer.echo(
        f"[{result['prompt_tokens']} prompt and {result['new_tokens']} new tokens; first after "
        f"{result['seconds_to_first_token']:.2f} s, then {result['tokens_per_second']:.1f} tokens/s "
        f"({result['loop']}); peak "
        f"{format_bytes(result['peak_private_bytes'])} private]",
        err=True,
    )
    console.notes(result["notes"], err=True)
    return code
