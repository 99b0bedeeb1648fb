"""`haversack run DIR --chat`: messages in, answers out, on a terminal or through a pipe."""

from __future__ import annotations

import json as json_text
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from haversack.cli import console
from haversack.engine.choice import Choice
from haversack.errors import HaversackError, UsageError
from haversack.units import format_bytes

if TYPE_CHECKING:
    from haversack.jobs.chat import Chat

FENCE = '"""'
PROMPT, MORE = ">>> ", "... "
HELP = f"""  /reset   forget the conversation (the system message stays)
  /exit    leave, as Ctrl-D does
  /help    this list
  {FENCE}      before and after a message of several lines
  Ctrl-C   end an answer"""


def converse(
    folder: Path,
    system: str | None,
    max_new_tokens: int | None,
    choice: Choice,
    cap_bytes: int | None,
    budget: str | None = None,
    *,
    json: bool,
) -> int:
    """Answer messages until there are no more; 0, or 130 where Ctrl-C ended an answer in a pipe."""
    from haversack.jobs.chat import Chat
    from haversack.jobs.run import within

    talks = sys.stdin.isatty() and not json
    with within(folder, cap_bytes, budget) as sampler:
        with console.status(f"loading {folder}"):
            chat = Chat(folder, system=system, max_new_tokens=max_new_tokens, choice=choice, budget=budget)
        console.notes(chat.notes, err=True)
        if talks:
            console.paragraph(
                f"{chat.capacity_tokens} tokens of context; when they are full, the oldest turns are forgotten. "
                "/help lists commands, Ctrl-D leaves.",
                err=True,
            )
        for message in _messages(talks):
            try:
                if _command(message, chat, talks):
                    continue
                result = chat.say(message, None if json else show, None if json else _print_forgotten)
            except (HaversackError, KeyboardInterrupt) as error:
                if not talks:
                    raise
                typer.echo("")
                console.error(str(error) or "stopped; the conversation is as it was.")
                continue
            _print_turn(result | {"peak_private_bytes": sampler.peak_bytes, "cap_bytes": cap_bytes}, talks, json)
            if result["finish"] == "interrupted" and not talks:
                return 130
    return 0


def show(piece: str) -> None:
    """A piece of an answer, as it comes."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def _messages(talks: bool) -> Iterator[str]:
    """Messages as they are typed or piped: a line each, or several between fences. Ends with the input, or `/exit`."""
    lines = _typed_lines() if talks else _piped_lines()
    for line in lines:
        message = line
        if line.startswith(FENCE):
            message = line[len(FENCE) :]
            while not message.endswith(FENCE):
                more = next(lines, None)
                if more is None:
                    break
                message += "\n" + more
            message = message.removesuffix(FENCE)
        if message.strip() == "/exit":
            return
        if message.strip():
            yield message


def _typed_lines() -> Iterator[str]:
    """Lines of a terminal, with its history; Ctrl-C gives up a line, Ctrl-D ends."""
    with suppress(ImportError):
        import readline  # noqa: F401  (makes `input` editable)
    while True:
        try:
            yield input(PROMPT)
        except KeyboardInterrupt:
            typer.echo("\n(Ctrl-D leaves)", err=True)
        except EOFError:
            typer.echo("")
            return


def _piped_lines() -> Iterator[str]:
    try:
        for line in sys.stdin:
            yield line.rstrip("\n")
    except UnicodeDecodeError:
        raise UsageError("standard input is not text (it is not UTF-8); pipe a plain text in.") from None


def _command(message: str, chat: Chat, talks: bool) -> bool:
    """Obey a command; whether it was one. A word behind a slash that is none is told, not sent."""
    word = message.strip()
    if not word.startswith("/") or " " in word or "/" in word[1:]:
        return False
    if word == "/reset":
        chat.reset()
    known = word in ("/reset", "/help")
    said = {"/reset": "forgotten; what you say next is the first turn.", "/help": HELP}.get(word)
    if talks or not known:
        typer.echo(said or f"{word} is no command; /help lists them.", err=True)
    return True


def _print_forgotten(num_turns: int) -> None:
    turns = "turn is" if num_turns == 1 else f"{num_turns} turns are"
    console.notes([f"the context is full; the oldest {turns} forgotten"], err=True)


def _print_turn(result: dict[str, Any], talks: bool, json: bool) -> None:
    if json:
        typer.echo(json_text.dumps(result, allow_nan=False))
        return
    typer.echo("")
    if result["finish"] == "context":
        console.notes(["the context is full, so the answer was cut; pack with a longer --context"], err=True)
    if not talks:
        return
    held = result["prompt_tokens"] + result["new_tokens"] - 1
    console.paragraph(
        f"[{result['read_tokens']} tokens read, {result['new_tokens']} new, first after "
        f"{result['seconds_to_first_token']:.2f} s, then {result['tokens_per_second']:.1f} tokens/s; "
        f"{held} of {result['context_tokens']} tokens; peak {format_bytes(result['peak_private_bytes'])}]",
        err=True,
    )
