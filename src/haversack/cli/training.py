"""`haversack plan --task tune|train`: does a step fit, what holds the bytes, what would make it fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from haversack.cli import console
from haversack.cli.money import operators_json, price_line, print_operators
from haversack.cli.question import runtimes_known
from haversack.cli.sweep import print_largest, print_sweep
from haversack.cli.verdict import verdict_json, verdict_words
from haversack.errors import UsageError
from haversack.units import format_seconds, parse_budget

if TYPE_CHECKING:
    from haversack.describe.machine import Machine
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


def plan_training_verb(
    model: Model,
    machine: Machine,
    task: str,
    *,
    budget: str | None,
    tensor_budget: str | None,
    batch: int,
    seq_len: int | None,
    pairs: list[str],
    largest_of: str | None,
    sweep_of: str | None = None,
    picture: Path | None = None,
    with_operators: bool = False,
    prices: Path | None = None,
    is_this_machine: bool = False,
    json: bool,
) -> int:
    """Print the answer; 0 if it fits, 1 if not."""
    from haversack.cost.roofline import total_seconds
    from haversack.plan.training import TrainingQuestion, largest, plan_training, step_operators

    length = seq_len or min(DEFAULT_SEQ_LEN, model.max_positions or DEFAULT_SEQ_LEN)
    workload, parallel = settings_of(task, batch, length, pairs)
    text = budget if budget is not None else tensor_budget
    if budget is not None and is_this_machine and parallel.ranks == 1:
        machine = runtimes_known(machine, parse_budget(budget, machine.tiers()["device"]))
    question = TrainingQuestion(
        model,
        workload,
        machine,
        parallel,
        None if text is None else parse_budget(text, machine.tiers()["device"]),
        "tensor" if tensor_budget is not None else "process",
    )
    if largest_of is not None:
        return print_largest(model.name, largest_of, largest(question, largest_of), json=json)
    if sweep_of is not None:
        from haversack.plan.sweep import sweep_training

        points = sweep_training(question, sweep_of)
        return print_sweep(points, sweep_of, budget_bytes=question.budget_bytes, output=picture, json=json)
    answer = plan_training(question)
    rows = step_operators(question, answer) if with_operators or json else []
    seconds = total_seconds(rows)
    with console.reader_may_leave():
        if json:
            more = {"operators": operators_json(rows), "seconds_per_step": seconds}
            console.print_json({**training_json(answer), **more})
        else:
            _print(answer)
        if with_operators and not json:
            typer.echo("")
            print_operators(rows)
            _print_money(question, seconds, prices)
    return 0 if answer.fits else 1


def _print_money(question: TrainingQuestion, seconds: float | None, prices: Path | None) -> None:
    """What a step takes at least, and a million tokens of all ranks together."""
    workload, parallel = question.workload, question.parallel
    per_token = None if seconds is None else seconds * parallel.ranks / (workload.step_tokens * parallel.data)
    step = "unknown" if seconds is None else format_seconds(seconds)
    typer.echo("")
    console.paragraph(
        f"a step takes at least {step}; per million tokens: {price_line(question.machine.name, prices, per_token)}."
    )


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
