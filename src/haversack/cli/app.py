"""The verbs, put together, and the one place where an error becomes an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import typer

from haversack._version import __version__
from haversack.cli import console
from haversack.cli.eval import app as eval_app
from haversack.cli.export import export
from haversack.cli.machine import machine
from haversack.cli.methods import methods
from haversack.cli.pack import pack
from haversack.cli.plan import plan
from haversack.cli.report import report
from haversack.cli.run import run as run_verb
from haversack.cli.tune import train, tune
from haversack.cli.verify import verify
from haversack.errors import HaversackError

TRACEBACK_VARIABLE = "HAVERSACK_TRACEBACK"
"""Set to 1, it lets errors that nobody foresaw through with their traceback."""

app = typer.Typer(
    name="haversack",
    help="Pack any LLM into the memory you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(plan)
app.command()(pack)
app.command(name="run")(run_verb)
app.command()(tune)
app.command()(train)
app.command()(verify)
app.add_typer(eval_app, name="eval")
app.command()(export)
app.command()(report)
app.command()(machine)
app.command()(methods)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"haversack {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Pack any LLM into the memory you have."""


def run(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code: 0, 1 (an answer or a failed job), 2 (wrong usage), 130 (interrupted).

    Whatever goes wrong prints as one sentence, never as a traceback.
    """
    if sys.stdout is None:  # closed by the caller (`>&-`)
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        code = app(args=argv, standalone_mode=False) or 0
        sys.stdout.flush()  # a closed pipe shows here at the latest
    except KeyboardInterrupt:
        code = 130
    except (BrokenPipeError, SystemExit):  # typer turns the first into the second
        console.leave_closed_pipe()
        return 0
    except Exception as error:
        return _explain(error)
    if code == 130:  # typer turns Ctrl-C into a bare exit code
        console.error("interrupted.")
    return code


def _explain(error: Exception) -> int:
    """Print an error as one sentence; its exit code."""
    if isinstance(error, HaversackError):
        console.error(str(error), details=getattr(error, "cheapest_change", None))
        return error.exit_code
    if _is_wrong_usage(error):
        return _explain_usage(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        console.error(f"{where}{error.strerror}; check the path, its permissions and the free space.")
        return 1
    if isinstance(error, MemoryError):
        console.error("this process ran out of memory; close other programs, or ask for less.")
        return 1
    return _unforeseen(error)


def _is_wrong_usage(error: Exception) -> bool:
    """Whether the option parser raised it. typer carries a click of its own, or uses the installed one, by version, so
    that only the bases of its public BadParameter (UsageError, then ClickException) are sure to be the classes."""
    return isinstance(error, typer.BadParameter.__mro__[2])


def _explain_usage(error: Exception) -> int:
    message: str = error.format_message()  # type: ignore[attr-defined]
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(message)
        return 0
    context = getattr(error, "ctx", None)
    names: list[str] = []
    while context is not None and context.parent is not None:  # the outermost is the program, however it was started
        names.insert(0, context.info_name)
        context = context.parent
    verb = " ".join(["haversack", *names])
    message = message.rstrip(".")
    console.error(f"{message}{'' if message.endswith('?') else ';'} `{verb} --help` lists what there is.")
    return 2


def _unforeseen(error: Exception) -> int:
    if os.environ.get(TRACEBACK_VARIABLE):
        raise error
    last = traceback.extract_tb(error.__traceback__)[-1]
    reason = " ".join(str(error).split())[:200]
    console.error(
        f"this is a defect of haversack ({type(error).__name__}: {reason}; {Path(last.filename).name} line "
        f"{last.lineno}); please report it with what {TRACEBACK_VARIABLE}=1 shows."
    )
    return 1
