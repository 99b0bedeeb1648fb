"""`haversack plan --task tune|train`: does a step fit, what holds the bytes, what would make it fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from haversack.cli import console
from haversack.cli.money import operators_json, price_line, print_operators
from haversack.cli.question import machine_named, runtimes_known
from haversack.cli.sweep import print_largest, print_sweep
from haversack.cli.verdict import verdict_json, verdict_words
from haversack.errors import UsageError
from haversack.units import format_seconds, parse_budget

if TYPE_CHECKING:
    from haversack.cli.question import Asked
    from haversack.cli.wanted import Wanted
    from haversack.describe.model import Model
    from haversack.describe.parallel import Parallelism
    from haversack.describe.workload import TrainWorkload, TuneWorkload
    from haversack.plan.training import TrainingAnswer, TrainingQuestion

DEFAULT_SEQ_LEN = 1024


def settings_of(
    task: str, batch: int, seq_len: int, pairs: list[str]
) -> tuple[TuneWorkload | TrainWorkload, Parallelism]:
    """The workload and the layout of `--with KEY=VALUE` pairs. Raises UsageError for an unknown key, with all there are."""
    from haversack.describe.parallel import Parallelism
    from haversack.describe.workload import TrainWorkload, TuneWorkload

    kind: Any = {"tune": TuneWorkload, "train": TrainWorkload}[task]
    own = {f.name: f for f in dataclasses.fields(kind) if f.name not in ("batch_size", "seq_len")}
    spread = {f.name: f for f in dataclasses.fields(Parallelism)}
    values: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or key not in {**own, **spread}:
            raise UsageError(
                f"--with {pair!r} is no setting of {task}; write KEY=VALUE with one of {', '.join([*own, *spread])}."
            )
        values[key] = _value(key, text, {**own, **spread}[key].default)
    workload = kind(batch, seq_len, **{k: v for k, v in values.items() if k in own})
    return workload, Parallelism(**{k: v for k, v in values.items() if k in spread})


def training_question(model: Model, asked: Asked, wanted: Wanted) -> TrainingQuestion:
    """The question in the planner's words. Raises UsageError for settings that there are not."""
    from haversack.plan.training import TrainingQuestion

    length = asked.context or min(DEFAULT_SEQ_LEN, model.max_positions or DEFAULT_SEQ_LEN)
    batch = 1 if wanted.batch is None else wanted.batch
    workload, parallel = settings_of(wanted.task, batch, length, wanted.settings or [])
    machine, text = machine_named(asked.machine), asked.budget_text
    if asked.budget is not None and asked.machine is None and parallel.ranks == 1:
        machine = runtimes_known(machine, parse_budget(asked.budget, machine.tiers()["device"]))
    return TrainingQuestion(
        model,
        workload,
        machine,
        parallel,
        None if text is None else parse_budget(text, machine.tiers()["device"]),
        "tensor" if asked.tensor_budget is not None else "process",
    )


def plan_training_verb(model: Model, asked: Asked, wanted: Wanted) -> int:
    """Print the answer; 0 if it fits, 1 if not."""
    from haversack.plan.training import largest

    question = training_question(model, asked, wanted)
    if wanted.largest is not None:
        return print_largest(model.name, wanted.largest, largest(question, wanted.largest), json=wanted.json)
    if wanted.sweep is not None:
        from haversack.plan.sweep import sweep_training

        points, budget_bytes = sweep_training(question, wanted.sweep), question.budget_bytes
        return print_sweep(points, wanted.sweep, budget_bytes=budget_bytes, output=wanted.output, json=wanted.json)
    return _plan_once(question, wanted)


def _plan_once(question: TrainingQuestion, wanted: Wanted) -> int:
    from haversack.cost.roofline import total_seconds
    from haversack.plan.training import plan_training, step_operators

    answer = plan_training(question)
    of_time = wanted.operators or wanted.json or wanted.prices is not None
    rows = step_operators(question, answer) if of_time else []
    seconds = total_seconds(rows)
    with console.reader_may_leave():
        if wanted.json:
            money = _price(question, seconds, wanted.prices) if wanted.prices is not None else None
            more = {"operators": operators_json(rows), "seconds_per_step": seconds, "per_million_tokens": money}
            console.print_json({**training_json(answer), **more})
            return 0 if answer.fits else 1
        _print(answer)
        if wanted.operators:
            typer.echo("")
            print_operators(rows)
        if of_time:
            step = "unknown" if seconds is None else format_seconds(seconds)
            typer.echo("")
            money = _price(question, seconds, wanted.prices)
            console.paragraph(f"a step takes at least {step}; per million tokens: {money}.")
    return 0 if answer.fits else 1


def _price(question: TrainingQuestion, seconds: float | None, prices: Path | None) -> str:
    """What a million tokens of all ranks together cost."""
    workload, parallel = question.workload, question.parallel
    per_token = None if seconds is None else seconds * parallel.ranks / (workload.step_tokens * parallel.data)
    return price_line(question.machine.name, prices, per_token)


def training_json(answer: TrainingAnswer) -> dict[str, Any]:
    """What `--json` prints."""
    question = answer.question
    return {
        **verdict_json(
            answer.ledger,
            fits=answer.fits,
            budget_bytes=question.budget_bytes,
            budget_kind=question.budget_kind,
            shortfall_bytes=answer.shortfall_bytes,
            cheapest_change=answer.cheapest_change,
        ),
        "workload": question.workload.to_dict(),
        "parallel": question.parallel.to_dict(),
        "stages": [
            {"layers": layers, "peak_bytes": ledger.peak()[1], "host_bytes": ledger.peak("host")[1]}
            for layers, ledger in zip(answer.rank.layers, answer.rank.stages, strict=True)
        ],
    }


def _print(answer: TrainingAnswer) -> None:
    question, ledger = answer.question, answer.ledger
    workload, parallel = question.workload, question.parallel
    verdict = verdict_words(fits=answer.fits, budget_bytes=question.budget_bytes, budget_kind=question.budget_kind)
    spread = "" if parallel.ranks == 1 else f" on each of {parallel.ranks} ranks"
    settings = ", ".join(
        f"{k} {v}" for k, v in workload.to_dict().items() if k not in ("task", "batch_size", "seq_len")
    )
    console.paragraph(f"{question.model.name}: {workload.batch_size} x {workload.seq_len} tokens{spread} ({settings}).")
    console.paragraph(f"{verdict}.")
    if not answer.fits:
        console.paragraph(f"{answer.problem} {answer.cheapest_change or ''}".rstrip())
    if len(answer.rank.stages) > 1:
        console.paragraph(
            f"shown: stage {answer.stage} of {len(answer.rank.stages)}, with {answer.rank.layers[answer.stage]} layers."
        )
    typer.echo("")
    console.ledger_table(ledger, besides=("resume", "evaluate"))


def _value(key: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise UsageError(f"{key} is {text!r}, but must be one of true, false.")
        return text == "true"
    if isinstance(default, int):
        if not text.isdigit():
            raise UsageError(f"{key} is {text!r}, but must be a whole number.")
        return int(text)
    if isinstance(default, float):
        try:
            return float(text)
        except ValueError:
            raise UsageError(f"{key} is {text!r}, but must be a number.") from None
    return text
