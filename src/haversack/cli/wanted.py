"""What `haversack plan` is asked beside a budget, as given, and which of it goes together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from haversack.cli.question import Asked, Calibrating, named_options
from haversack.cli.sweep import check_picture
from haversack.errors import UsageError

TASKS = ("serve", "tune", "train")
OF_TRAINING = ("--budget", "--tensor-budget", "--context", "--machine")
"""Options of a question to serve that tuning and training take too."""


@dataclass(frozen=True)
class Wanted:
    """What `plan` is to answer, and how."""

    task: Annotated[str, typer.Option("--task", help="serve, tune or train.")] = "serve"
    batch: Annotated[
        int | None, typer.Option("--batch", help="Sequences per step and rank, to tune or train; 1 if left out.")
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="KEY=VALUE", help="How to tune or train: optimizer=adamw8bit, zero=3."),
    ] = None
    largest: Annotated[
        str | None, typer.Option("--largest", help="The largest context, number of users, batch or model that fits.")
    ] = None
    among: Annotated[
        list[str] | None,
        typer.Option("--among", metavar="MODEL", help="A sibling of MODEL, for --largest model; repeatable."),
    ] = None
    sweep: Annotated[
        str | None, typer.Option("--sweep", help="Vary context, users or batch; --output draws it (SVG).")
    ] = None
    operators: Annotated[
        bool, typer.Option("--operators", help="Show each kind of operator's bytes, flops and bottleneck.")
    ] = False
    prices: Annotated[
        Path | None, typer.Option("--prices", help="What machines cost (TOML); the package's own list if left out.")
    ] = None
    mix: Annotated[
        list[str] | None,
        typer.Option("--mix", metavar="RATE:PROMPT:ANSWER", help="Requests a second: the cheapest machines for them."),
    ] = None
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan, or the picture, here.")] = None
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False

    @property
    def varies(self) -> bool:
        """Whether more than one plan is asked for."""
        return self.sweep is not None or self.largest is not None

    def check(self, asked: Asked, calibrating: Calibrating, *, calibrate: bool) -> None:
        """Raises UsageError where options contradict each other, would go unheard or name what can't be read, before any
        model is looked at, and OutputError where the output can't be written."""
        if self.task not in TASKS:
            raise UsageError(f"--task {self.task!r} is not one of {', '.join(TASKS)}.")
        weighing = [*(["--calibrate"] if calibrate else []), *named_options(calibrating)]
        if self.mix:
            _refuse(
                [*named_options(asked), *weighing, *named_options(self)],
                "--mix goes with --prices and --json alone, since machines are what is asked for",
                but=("--mix", "--prices", "--json"),
            )
        elif self.task == "serve":
            self._check_serving(asked)
        else:
            self._check_training(asked, weighing)
        if weighing and not {"--calibrate", "--calibration"} & set(weighing):
            raise UsageError(f"{weighing[0]} says how options are weighed; add --calibrate, or leave it out.")
        self._check_varied(weighing)
        self._check_output()
        if self.prices is not None:
            from haversack.describe.prices import read_prices

            read_prices(self.prices)

    def _check_serving(self, asked: Asked) -> None:
        _refuse(
            named_options(self),
            "serving has options of its own, like --users; it is for --task tune and train",
            but=[name for name in named_options(self) if name not in ("--with", "--batch")],
        )
        asked.check()

    def _check_training(self, asked: Asked, weighing: list[str]) -> None:
        _refuse(
            [*named_options(asked), *weighing],
            f"it is for --task serve; a plan to {self.task} is asked by --batch, --context and --with",
            but=OF_TRAINING,
        )
        asked.check_budget()
        asked.check_lengths()
        if self.output is not None and self.sweep is None:
            raise UsageError("--output writes plans that serve; --task tune and train are printed, or given by --json.")

    def _check_varied(self, weighing: list[str]) -> None:
        if self.largest is not None and self.sweep is not None:
            raise UsageError("--largest and --sweep were both given; ask one after the other.")
        if (self.largest == "model") != bool(self.among):
            raise UsageError(
                "--largest model goes with --among MODEL, once for each other model to choose from; give both, or neither."
            )
        if self.varies:
            _refuse(weighing, "--sweep and --largest cite damages instead of weighing options")
            shown = [name for name in named_options(self) if name in ("--operators", "--prices")]
            _refuse(shown, "it tells of one plan, and --sweep and --largest make many")

    def _check_output(self) -> None:
        if self.sweep is not None:
            check_picture(self.output)
        elif self.output is not None:
            if self.largest is not None:
                raise UsageError("--output writes a plan, or a sweep's picture; leave it out with --largest.")
            from haversack.formats.output import check_output_file

            check_output_file(self.output)


def _refuse(options: list[str], why: str, *, but: Collection[str] = ()) -> None:
    """Raise UsageError that names the first option which is not among those allowed."""
    for name in options:
        if name not in but:
            raise UsageError(f"{name} was given, but {why}; leave {name} out.")
