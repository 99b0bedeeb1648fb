"""The verbs, put together, and the one place where an error becomes an exit code."""

from __future__ import annotations

import sys

import click
import typer

from haversack._version import __version__
from haversack.cli import console
from haversack.cli.methods import methods
from haversack.cli.pack import pack
from haversack.cli.plan import plan
from haversack.cli.report import report
from haversack.cli.run import run as run_verb
from haversack.cli.verify import verify
from haversack.errors import HaversackError, InterruptedJobError

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
app.command()(verify)
app.command()(report)
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
    """Run the command line; the exit code. Errors raised on purpose print as one sentence."""
    try:
        return app(args=argv, standalone_mode=False) or 0
    except InterruptedJobError as error:
        console.error(str(error))
        return error.exit_code
    except HaversackError as error:
        console.error(str(error), details=getattr(error, "cheapest_change", None))
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        console.error("interrupted")
        return 130
    except click.exceptions.NoArgsIsHelpError as error:
        typer.echo(error.format_message())
        return 0
    except click.ClickException as error:
        error.show(file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()
        return 0
