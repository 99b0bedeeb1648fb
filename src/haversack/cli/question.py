"""The options that `plan` and `pack` share, and how they become a question."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from haversack.cli.console import Progress
from haversack.errors import UsageError
from haversack.units import parse_budget

if TYPE_CHECKING:
    from haversack.cli.wanted import Wanted
    from haversack.cost.calibrated import Calibration
    from haversack.describe.machine import Machine
    from haversack.describe.model import Model
    from haversack.describe.workload import ServeWorkload
    from haversack.plan.question import Answer, Question
    from haversack.plan.refine import PlanMeter

Source = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder or a hub id, in the Hugging Face layout.")]
Budget = Annotated[
    str | None, typer.Option("--budget", help="Peak of the whole process: 8GiB, 8GB, or 60% of available memory.")
]
TensorBudget = Annotated[
    str | None, typer.Option("--tensor-budget", help="Peak of our tensors alone (for small models and tables).")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code while describing it.")]

DEFAULT_CONTEXT_TOKENS = 1024
MIN_CALIBRATION_TOKENS = 2
"""A token to read and one to predict."""

MAX_TOKENS, MAX_USERS, MAX_CACHED_TOKENS = 10**8, 10**6, 10**11
"""Bounds of sense, so that a slipped digit is told before it overflows. The last is of all users together."""

DEFAULT_EVALUATIONS = 6
PLANNED = ("weights", "kv")
"""Residents that a plan to serve chooses options for."""

PLACEMENTS = ("auto", "resident", "mapped", "streamed")


@dataclass(frozen=True)
class Asked:
    """The options of a question, as given."""

    budget: Budget = None
    tensor_budget: TensorBudget = None
    max_damage: Annotated[
        float | None, typer.Option("--max-damage", help="Turn the question round: the fewest bytes at this many nats.")
    ] = None
    context: Annotated[int | None, typer.Option("--context", help="Tokens per user, prompt and answer together.")] = (
        None
    )
    prompt_tokens: Annotated[int | None, typer.Option("--prompt-tokens", help="Tokens of each prompt.")] = None
    generate_tokens: Annotated[int | None, typer.Option("--generate-tokens", help="Tokens generated after it.")] = None
    users: Annotated[int, typer.Option("--users", help="Sequences at once.")] = 1
    min_tokens_per_second: Annotated[
        float | None, typer.Option("--min-tokens-per-second", help="A bound on decoding speed, summed over users.")
    ] = None
    placement: Annotated[str, typer.Option("--placement", help="auto, resident, mapped or streamed.")] = "auto"
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe", metavar="ID", help="Offer weights (or caches) this recipe's options alone; repeatable."
        ),
    ] = None
    machine: Annotated[
        str | None, typer.Option("--machine", help="A named machine, or a machine file; this one if left out.")
    ] = None

    @property
    def says_anything(self) -> bool:
        """Whether any option was given."""
        return self != Asked()

    def check(self) -> None:
        """Raises UsageError where options contradict each other, before any model is looked at."""
        if self.placement not in PLACEMENTS:
            raise UsageError(f"--placement {self.placement!r} is not one of {', '.join(PLACEMENTS)}.")
        self.check_budget()
        if self.budget_text is None and self.max_damage is None:
            raise UsageError(
                "no budget was given; say --budget 8GiB (or 60%), or turn the question round with --max-damage."
            )
        if self.max_damage is not None and not 0 <= self.max_damage < math.inf:
            raise UsageError(
                f"--max-damage is {self.max_damage:g} nats per token, but must be a number of at least 0, like 0.05."
            )
        if self.recipe:
            from haversack.recipes.base import check_recipes

            check_recipes(self.recipe, PLANNED)
        self.check_lengths()

    def check_budget(self) -> None:
        """Raises UsageError for two budgets, and for one that makes no sense."""
        if self.budget is not None and self.tensor_budget is not None:
            raise UsageError("--budget and --tensor-budget were both given; a plan has one budget.")
        if self.budget_text is not None:
            parse_budget(self.budget_text, available_bytes=2**60)  # any machine's memory will do to see nonsense

    @property
    def recipes(self) -> tuple[str, ...]:
        """The recipes that the question is restricted to, each once."""
        return tuple(sorted(set(self.recipe or ())))

    @property
    def budget_text(self) -> str | None:
        """The one budget that was given."""
        return self.budget if self.budget is not None else self.tensor_budget

    def check_lengths(self) -> None:
        """Raises UsageError for numbers of tokens or users that make no sense, or contradict each other."""
        prompt, generate, context = self.prompt_tokens, self.generate_tokens, self.context
        for name, value, least, most in (
            ("--context", context, 1, MAX_TOKENS),
            ("--prompt-tokens", prompt, 1, MAX_TOKENS),
            ("--generate-tokens", generate, 0, MAX_TOKENS),
            ("--users", self.users, 1, MAX_USERS),
        ):
            if value is not None and not least <= value <= most:
                raise UsageError(f"{name} is {value}, but must be a whole number from {least} to {most:,}.")
        speed = self.min_tokens_per_second
        if speed is not None and not 0 < speed < math.inf:
            raise UsageError(f"--min-tokens-per-second is {speed:g}, but must be a number above 0.")
        if context is None:
            return
        given = " and ".join(
            f"{name} {value}"
            for name, value in (("--prompt-tokens", prompt), ("--generate-tokens", generate))
            if value is not None
        )
        total = (prompt or 0) + (generate or 0)
        if (prompt is not None and generate is not None and total != context) or total > context:
            make = f"make {total} tokens" if " and " in given else "alone is more"
            raise UsageError(f"{given} {make}, but --context says {context}; leave one of them out.")

    def question(self, model: Model, calibration: Calibration | None, *, lossless: bool = False) -> Question:
        """The question in the planner's words; with `lossless`, only what changes no value."""
        from haversack.plan.question import Question

        machine = machine_named(self.machine)
        text = self.budget_text
        budget_bytes = None if text is None else parse_budget(text, machine.tiers()["device"])
        if self.budget is not None and self.machine is None:
            machine = runtimes_known(machine, budget_bytes)
        return Question(
            model=model,
            workload=self.workload(model),
            machine=machine,
            budget_bytes=budget_bytes,
            budget_kind="tensor" if self.tensor_budget is not None else "process",
            max_damage=self.max_damage,
            placement="resident" if lossless and self.placement == "auto" else self.placement,  # type: ignore[arg-type]
            lossless=lossless,
            recipes=self.recipes,
            weight_damages=None if calibration is None else calibration.weight_damages,
            kv_damages=None if calibration is None else calibration.kv_damages,
        )

    def workload(self, model: Model) -> ServeWorkload:
        """Prompt and answer from whichever of the three lengths were given; three quarters prompt by default."""
        from haversack.describe.workload import ServeWorkload

        prompt, generate, context = self.prompt_tokens, self.generate_tokens, self.context
        if context is None and (prompt is None or generate is None):
            context = min(DEFAULT_CONTEXT_TOKENS, model.max_positions or DEFAULT_CONTEXT_TOKENS)
            context = max(context, (prompt or 0) + (generate or 0) + (prompt is None) + (generate is None))
        if prompt is None and generate is None:
            assert context is not None
            generate = context // 4
        if generate is None:
            assert context is not None and prompt is not None
            generate = context - prompt
        if prompt is None:
            assert context is not None
            prompt = context - generate
        if (prompt + generate) * self.users > MAX_CACHED_TOKENS:
            raise UsageError(
                f"{self.users} users of {prompt + generate} tokens are more than {MAX_CACHED_TOKENS:,} tokens at once; "
                "ask for fewer."
            )
        return ServeWorkload(prompt, generate, self.users, min_tokens_per_second=self.min_tokens_per_second)


def named_options(given: Asked | Calibrating | Wanted) -> list[str]:
    """The options that were given, as they are written on a command line."""
    hints = get_type_hints(type(given), include_extras=True)
    names = {option.name: hints[option.name].__metadata__[0].default for option in fields(given)}
    return [names[option.name] for option in fields(given) if getattr(given, option.name) != option.default]


def machine_named(name: str | None) -> Machine:
    """This machine with the rates measured earlier, a named one, or a file's."""
    from haversack.describe import machine

    if name is None:
        return machine.known()
    if Path(name).is_file() or Path(name).suffix == ".json":
        return machine.from_file(name)
    return machine.named(name)


def runtimes_known(machine: Machine, peak_bytes: int | None) -> Machine:
    """This machine with what its runtimes take, measured if they never were, where they are a share of the peak that matters."""
    from haversack.describe.runtime import MATTERS_BELOW_BYTES, with_runtimes

    if peak_bytes is None or peak_bytes > MATTERS_BELOW_BYTES:
        return machine
    return with_runtimes(machine)


@dataclass(frozen=True)
class Calibrating:
    """What options are weighed on, as given."""

    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Text to calibrate on; a built-in one if left out.")
    ] = None
    calibration_tokens: Annotated[int, typer.Option("--calibration-tokens", help="How much of it.")] = 32_768
    evaluations: Annotated[
        int | None,
        typer.Option(
            "--evaluations", min=0, help="Whole plans to measure; 6 for models up to 100M parameters, else 0."
        ),
    ] = None

    probes: Annotated[
        bool, typer.Option("--probes", help="Weigh caches head by head on recall probes too; the worst probe decides.")
    ] = False

    def text(self) -> str:
        """The file's text, or the built-in one. Raises UsageError where there is none to calibrate on."""
        return calibration_text(self.calibration, self.calibration_tokens)

    def run(self, model: Model, context_tokens: int, progress: Progress, recipes: tuple[str, ...] = ()) -> Calibration:
        """Calibrate a model. Raises InterruptedJobError on Ctrl-C."""
        return calibration_for(
            model, self.calibration, self.calibration_tokens, context_tokens, progress, recipes, probes=self.probes
        )


def spread_options(verb: Callable[..., int]) -> Callable[..., int]:
    """A verb with one option per field for each of its parameters that is a dataclass, so that verbs which take the same
    options have them written once."""
    hints = get_type_hints(verb, include_extras=True)
    groups = {name: cls for name, cls in hints.items() if isinstance(cls, type) and is_dataclass(cls)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(verb).parameters.values():
        if parameter.name not in groups:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        options = get_type_hints(groups[parameter.name], include_extras=True)
        for option in fields(groups[parameter.name]):
            keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
            default = inspect.Parameter.empty if option.default is MISSING else option.default
            parameters.append(inspect.Parameter(option.name, keyword, default=default, annotation=options[option.name]))

    @functools.wraps(verb)
    def spread(**given: Any) -> int:
        for name, cls in groups.items():
            given[name] = cls(**{option.name: given.pop(option.name) for option in fields(cls)})
        return verb(**given)

    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spread


def weighed_answer(
    asked: Asked, model: Model, calibrating: Calibrating, progress: Progress
) -> tuple[Answer, Calibration | None]:
    """The plan, and the calibration that it rests on: none where everything fits as it is, or where nothing can."""
    from haversack.cost.lossless import lossless_damages
    from haversack.plan.make import hopeless, make_plan

    if asked.budget_text is not None:
        answer = make_plan(asked.question(model, None, lossless=True), progress)
        if answer.fits:
            return answer, None
        if _may_fit_in_codes(answer):
            damages = lossless_damages(model, asked.recipes, progress)
            question = dataclasses.replace(asked.question(model, None, lossless=True), weight_damages=damages)
            if (answer := make_plan(question, progress)).fits:
                return answer, None
        # heads weighed one by one are offered less than any recipe's option takes, so that only calibrating tells
        if not calibrating.probes and (too_large := hopeless(asked.question(model, None))) is not None:
            return too_large, None
    # Something must be lost, or the fewest bytes were asked for: find out where it hurts least.
    found = calibrating.run(model, asked.workload(model).context_tokens, progress, asked.recipes)
    meter = meter_for(found, calibrating.evaluations, progress)
    return make_plan(asked.question(model, found), progress, meter), found


def _may_fit_in_codes(answer: Answer) -> bool:
    """Whether what is short may be had of the weights without loss: worth reading them all to know."""
    from haversack.cost.lossless import LEAST_SHARE

    return 0 < answer.shortfall_bytes < (1 - LEAST_SHARE) * sum(row.neutral_bytes for row in answer.plan.weights)


def calibration_for(
    model: Model,
    file: Path | None,
    num_tokens: int,
    context_tokens: int,
    progress: Progress,
    recipes: tuple[str, ...] = (),
    *,
    probes: bool = False,
) -> Calibration:
    """Calibrate a model on a file's text, or on the built-in text, for options of `recipes` alone if named. Raises InterruptedJobError on Ctrl-C."""
    from haversack.cost.calibrated import calibrate_model
    from haversack.errors import InterruptedJobError

    text = calibration_text(file, num_tokens)
    try:
        return calibrate_model(
            model,
            text,
            num_tokens=num_tokens,
            kv_capacity_tokens=min(context_tokens, 1024),
            recipes=recipes,
            probes=probes,
            progress=progress,
        )
    except KeyboardInterrupt:
        raise InterruptedJobError(
            "calibration was interrupted; what it finished is kept, and the same command goes on from there."
        ) from None


def calibration_text(file: Path | None, num_tokens: int) -> str:
    """A file's text, or the built-in one. Raises UsageError where there is none to calibrate on."""
    from haversack import data

    if num_tokens < MIN_CALIBRATION_TOKENS:
        raise UsageError(
            f"--calibration-tokens is {num_tokens}, but must be at least {MIN_CALIBRATION_TOKENS}; some 32,768 are right."
        )
    if file is None:
        return data.text("calibration")
    try:
        text = file.read_text(encoding="utf-8", errors="strict")
    except OSError as error:
        raise UsageError(f"can't read the calibration text {file}: {error.strerror}; name a plain text file.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file} is not text (it is not UTF-8); name a plain text file.") from None
    if not text.strip():
        raise UsageError(f"the calibration text {file} is empty; name a text file of some hundred kilobytes.")
    return text


def meter_for(calibration: Calibration, evaluations: int | None, progress: Progress) -> PlanMeter | None:
    """What measures whole plans, or None where none shall be."""
    from haversack.cost.single_changes import is_small
    from haversack.plan.refine import PlanMeter

    if evaluations is None:
        evaluations = DEFAULT_EVALUATIONS if is_small(calibration.model) else 0
    return PlanMeter(calibration, evaluations, progress) if evaluations else None
