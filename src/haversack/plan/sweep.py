"""One number of a workload varied, or the model: what each takes, and the largest that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from haversack.cost.roofline import total_seconds, training_operators
from haversack.describe.workload import ServeWorkload
from haversack.errors import UsageError
from haversack.plan.make import make_plan
from haversack.plan.question import Question
from haversack.plan.search import largest_that
from haversack.plan.training import TrainingQuestion, predict_training

SERVED = ("context", "users")
TRAINED = ("context", "batch")
LEAST_CONTEXT = 256
MOST = {"context": 2**20, "users": 2**16, "batch": 2**16}
"""Where a model names no limit, and of users and batches: more than any machine takes."""

MAX_POINTS = 14


@dataclass(frozen=True)
class SweepPoint:
    """One value: the highest time point and its bytes by owner, whether it fits, and tokens per second (None: unknown)."""

    value: int
    point: str
    owners: Mapping[str, int]
    fits: bool
    tokens_per_second: float | None

    @property
    def peak_bytes(self) -> int:
        return sum(self.owners.values())


def check_served(what: str, budget_bytes: int | None, option: str) -> None:
    """Raises UsageError for what serving has not, and for a largest value without a budget."""
    if what not in SERVED:
        raise UsageError(f"{option} {what!r} is not one of {', '.join(SERVED)}, which serving has.")
    if budget_bytes is None:
        raise UsageError(f"{option} {what} was asked without a budget; say --budget 8GiB.")


def sweep_serving(question: Question, what: str) -> Iterator[SweepPoint]:
    """Doubling values up to the first that does not fit. Prompt and answer keep their proportion."""
    check_served(what, question.budget_bytes, "--sweep")
    for value in _doubling(what, question.model.max_positions):
        answer = make_plan(serving_at(question, what, value))
        prediction, ledger = answer.plan.prediction, answer.plan.ledger
        users = int(answer.plan.workload["users"])
        speed = users / prediction.seconds_per_token if prediction.seconds_per_token else None
        yield SweepPoint(
            value, prediction.peak_time_point, ledger.owners_at(prediction.peak_time_point), answer.fits, speed
        )
        if not answer.fits:
            return


def largest_served(question: Question, what: str) -> int | None:
    """The longest context, or the most users, that fits; None where not even the least does."""
    check_served(what, question.budget_bytes, "--largest")
    most = question.model.max_positions if what == "context" else None
    return largest_that(
        lambda value: make_plan(serving_at(question, what, value)).fits,
        2 if what == "context" else 1,
        most or MOST[what],
    )


def serving_at(question: Question, what: str, value: int) -> Question:
    """The same question with another context or number of users."""
    workload = question.workload
    if what == "users":
        return dataclasses.replace(question, workload=dataclasses.replace(workload, users=value))
    generate = min(value - 1, round(value * workload.generate_tokens / workload.context_tokens))
    changed: ServeWorkload = dataclasses.replace(workload, prompt_tokens=value - generate, generate_tokens=generate)
    return dataclasses.replace(question, workload=changed)


def sweep_training(question: TrainingQuestion, what: str) -> Iterator[SweepPoint]:
    """Doubling values up to the first that does not fit (all of them without a budget)."""
    if what not in TRAINED:
        raise UsageError(f"--sweep {what!r} is not one of {', '.join(TRAINED)}, which tuning and training have.")
    field = "batch_size" if what == "batch" else "seq_len"
    for value in _doubling(what, question.model.max_positions):
        workload = dataclasses.replace(question.workload, **{field: value})  # type: ignore[arg-type]
        answer = predict_training(dataclasses.replace(question, workload=workload))
        point, _ = answer.ledger.peak()
        seconds = total_seconds(training_operators(question.model, workload, question.machine))
        speed = workload.step_tokens / seconds if seconds else None
        yield SweepPoint(value, point, answer.ledger.owners_at(point), answer.fits, speed)
        if not answer.fits:
            return


@dataclass(frozen=True)
class ModelFit:
    """One model of several that were compared: its parameters, the plan's peak, and whether it fits."""

    name: str
    num_parameters: int
    peak_bytes: int
    fits: bool


def compare_served(questions: Sequence[Question]) -> list[ModelFit]:
    """The same question of several models, the largest first. Raises UsageError without a budget."""
    if questions[0].budget_bytes is None:
        raise UsageError("--largest model was asked without a budget; say --budget 8GiB.")
    answers = ((question.model, make_plan(question)) for question in questions)
    return _largest_first(
        ModelFit(model.name, model.num_parameters, answer.plan.prediction.peak_bytes, answer.fits)
        for model, answer in answers
    )


def compare_trained(questions: Sequence[TrainingQuestion]) -> list[ModelFit]:
    """The same step of several models, the largest first. Raises UsageError without a budget."""
    if questions[0].budget_bytes is None:
        raise UsageError("--largest model was asked without a budget; say --budget 8GiB.")
    answers = ((question.model, predict_training(question)) for question in questions)
    return _largest_first(
        ModelFit(model.name, model.num_parameters, answer.ledger.peak()[1], answer.fits) for model, answer in answers
    )


def _largest_first(fits: Iterable[ModelFit]) -> list[ModelFit]:
    return sorted(fits, key=lambda fit: -fit.num_parameters)


def _doubling(what: str, max_positions: int | None) -> Iterator[int]:
    most = (max_positions or MOST[what]) if what == "context" else MOST[what]
    value = min(most, LEAST_CONTEXT) if what == "context" else 1
    for _ in range(MAX_POINTS):
        yield value
        if value >= most:
            return
        value = min(most, value * 2)
