"""Does a training or tuning run fit: predicted before anything loads, with the cheapest change that would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from haversack.cost.parallel import RankCost, rank_cost, sent_bytes
from haversack.cost.roofline import Operator, communication_operator, training_operators, update_operator
from haversack.cost.training import DEFAULT_TRAINING_RUNTIME_BYTES, SLACK_FRACTION, STATES, TrainingCost
from haversack.describe.machine import Machine
from haversack.describe.model import Model
from haversack.describe.parallel import Parallelism
from haversack.describe.workload import PACKED, TrainWorkload, TuneWorkload, check_positions
from haversack.engine.cut_loss import cuts
from haversack.engine.training_trace import GRADIENTS
from haversack.errors import DoesNotFitError, UsageError
from haversack.ledger import Ledger
from haversack.plan.search import largest_that
from haversack.recipes.base import optimizer_option, preference
from haversack.units import format_bytes

LARGEST = ("batch", "context")

PASSES = frozenset({"reference", "forward", "loss", "backward", "update", "evaluate"})
"""Time points that hold less where a pass keeps less."""

STATE_POINTS = frozenset({"resume", "save"})
"""Time points that hold less where there are fewer states."""

_MAX_TRIES = 12


@dataclass(frozen=True)
class TrainingQuestion:
    """What is asked: a model, a workload and a machine, within `budget_bytes` on each rank (None: not limited). `base_bytes`
    are, by owner, what the weights of a base hold that is packed already; `whole_at_ends` says that each rank loads and exports whole
    weights, as our runs do."""

    model: Model
    workload: TuneWorkload | TrainWorkload
    machine: Machine
    parallel: Parallelism
    budget_bytes: int | None
    budget_kind: Literal["process", "tensor"] = "process"
    base_bytes: Mapping[str, int] | None = None
    whole_at_ends: bool = False

    @property
    def runtime_bytes(self) -> int:
        if self.budget_kind == "tensor":
            return 0
        return self.machine.rates.training_private_bytes or DEFAULT_TRAINING_RUNTIME_BYTES

    @property
    def tensor_bytes(self) -> int | None:
        """What the budget leaves for tensors, runtime and slack aside; None without a budget."""
        if self.budget_bytes is None or self.budget_kind == "tensor":
            return self.budget_bytes
        return max(0, int((self.budget_bytes - self.runtime_bytes) / (1 + SLACK_FRACTION)))


@dataclass(frozen=True)
class TrainingAnswer:
    """The worst rank's ledger; whether it fits, by how much not, and one change that would do."""

    question: TrainingQuestion
    rank: RankCost
    stage: int
    ledger: Ledger
    shortfall_bytes: int
    cheapest_change: str | None = None

    @property
    def cost(self) -> TrainingCost:
        """What the step takes, before it is spread over ranks."""
        return self.rank.cost

    @property
    def fits(self) -> bool:
        return not self.shortfall_bytes

    @property
    def disk_shortfall_bytes(self) -> int:
        """What is kept on disk beyond what the machine has free there."""
        disk = self.question.machine.disk
        return 0 if disk is None else max(0, self.ledger.peak("disk")[1] - disk.free_bytes)

    @property
    def problem(self) -> str:
        """What is short, in one sentence."""
        if self.disk_shortfall_bytes:
            return (
                f"{self.question.model.name} keeps {format_bytes(self.ledger.peak('disk')[1])} of activations on disk, which has "
                f"{format_bytes(self.disk_shortfall_bytes)} less."
            )
        point, peak = self.ledger.peak()
        owners = ", ".join(f"{k} {format_bytes(n)}" for k, n in list(self.ledger.owners_at(point).items())[:3])
        return (
            f"{self.question.model.name} needs {format_bytes(peak)} at {point} ({owners}), but the budget is "
            f"{format_bytes(self.question.budget_bytes or 0)}: {format_bytes(self.shortfall_bytes)} short."
        )

    def require_fit(self) -> None:
        """Raise DoesNotFitError with shortfall, owners and the cheapest change, before anything loads."""
        if self.fits:
            return
        raise DoesNotFitError(
            self.problem,
            budget_bytes=self.question.budget_bytes or 0,
            shortfall_bytes=self.shortfall_bytes,
            owners=self.ledger.owners_at(self.ledger.peak()[0]),
            cheapest_change=self.cheapest_change,
        )


def predict_training(question: TrainingQuestion) -> TrainingAnswer:
    """Whether exactly this fits. Raises UsageError for an unknown optimizer, sequences beyond the
    model's positions and degrees that don't divide."""
    optimizer_option(question.workload.optimizer)
    if isinstance(question.workload, TuneWorkload):
        preference(question.workload.objective)
    check_positions(question.workload, question.model.max_positions, question.model.name)
    return _answer(question)


def plan_training(question: TrainingQuestion) -> TrainingAnswer:
    """Whether it fits and, if not, the cheapest change that would make it. Raises as `predict_training` does."""
    answer = predict_training(question)
    if answer.fits:
        return answer
    least, how = answer.ledger.peak()[1], ""
    for change, other in _changes(question, answer.ledger):
        tried = _answer(other)
        if tried.fits:
            return dataclasses.replace(answer, cheapest_change=f"It would fit with {change}.")
        if tried.ledger.peak()[1] < least:
            least, how = tried.ledger.peak()[1], f" with {change}"
    sentence = f"None of the changes tried would do; a budget of {format_bytes(least)} would{how}."
    return dataclasses.replace(answer, cheapest_change=sentence)


def largest(question: TrainingQuestion, what: str) -> int | None:
    """The largest `batch` (sequences per rank), or the longest `context` (tokens), that fits; None where not even the smallest
    does. Raises UsageError for another word, or without a budget."""
    if what not in LARGEST:
        raise UsageError(f"--largest {what!r} is not one of {', '.join(LARGEST)}.")
    if question.budget_bytes is None:
        raise UsageError(f"the largest {what} was asked without a budget; say --budget 8GiB.")
    if what == "batch":
        least, most, step, field = 1, 2**20, 1, "batch_size"
    else:
        step = question.parallel.context
        least, field = 2 * step, "seq_len"
        most = question.model.max_positions or 2**20

    def fits(value: int) -> bool:
        workload = dataclasses.replace(question.workload, **{field: value})  # type: ignore[arg-type]
        return _answer(dataclasses.replace(question, workload=workload)).fits

    return largest_that(fits, least, most, step)


def _answer(question: TrainingQuestion) -> TrainingAnswer:
    rank = rank_cost(
        question.model,
        question.workload,
        question.parallel,
        runtime_bytes=question.runtime_bytes,
        base_bytes=question.base_bytes,
        whole_at_ends=question.whole_at_ends,
        on_host=not question.machine.devices,
    )
    stage, ledger = rank.worst()
    peak = ledger.peak()[1]
    short = 0 if question.budget_bytes is None else max(0, peak - question.budget_bytes)
    answer = TrainingAnswer(question, rank, stage, ledger, short)
    return dataclasses.replace(answer, shortfall_bytes=max(short, answer.disk_shortfall_bytes))


def step_operators(question: TrainingQuestion, answer: TrainingAnswer) -> list[Operator]:
    """One rank's step: passes, update and communication. Tensor-parallel ranks share products evenly; bubbles of a
    pipeline are not counted."""
    parallel, workload = question.parallel, question.workload
    share = 1 / (parallel.tensor * parallel.pipeline * parallel.context)
    passes = [
        dataclasses.replace(
            operator,
            num_bytes=operator.num_bytes * share,
            flops=operator.flops * share,
            bytes_seconds=None if operator.bytes_seconds is None else operator.bytes_seconds * share,
            flops_seconds=None if operator.flops_seconds is None else operator.flops_seconds * share,
        )
        for operator in training_operators(question.model, workload, question.machine)
    ]
    owners = answer.ledger.owners_at("update")
    touched = 2 * sum(owners.get(name, 0) for name in (STATES, "master weights", "weights")) + owners.get(GRADIENTS, 0)
    sent = sent_bytes(question.model, workload, parallel)
    rows = [*passes, update_operator(question.machine, touched)]
    return [*rows, communication_operator(question.machine, sent)] if sent else rows


def _changes(question: TrainingQuestion, ledger: Ledger) -> Iterator[tuple[str, TrainingQuestion]]:
    """Changes from the cheapest: what costs time alone, then what rounds states or weights, then what trains less. Those that can't lower a
    time point of `ledger` which is over the budget are left out."""
    workload = question.workload
    over = {point for point in ledger.timeline if ledger.total_bytes(point) > (question.budget_bytes or 0)}
    by_pass, by_states = over <= PASSES, over <= {*PASSES, *STATE_POINTS}

    def changed(**fields: object) -> TrainingQuestion:
        return dataclasses.replace(question, workload=dataclasses.replace(workload, **fields))  # type: ignore[arg-type]

    sparing: dict[str, object] = {}
    if workload.loss != "cut" and cuts(question.model):
        sparing["loss"] = "cut"
        if by_pass:
            yield "loss=cut (the same result in about the same time)", changed(**sparing)
    if workload.recompute == "none" and workload.saved == "exact" and not _keeps_nothing(workload):
        some = _some_layers(question, sparing) if by_pass else None
        if some is not None:
            yield f"{_words({**sparing, **some})} (the same result, those layers run twice)", changed(**sparing, **some)
        sparing["recompute"] = "full"
        if by_pass:
            yield f"{_words(sparing)} (the same result, about a third more time)", changed(**sparing)
    if by_pass and workload.update == "step" and workload.can_update_in_backward and question.parallel.ranks == 1:
        once = {**sparing, "update": "backward"}
        yield (
            f"{_words(once)} (the same result, but gradients can't be clipped by their norm together)",
            changed(**once),
        )
    if workload.batch_size > 1:
        sparing |= {"batch_size": 1, "accumulation_steps": workload.accumulation_steps * workload.batch_size}
        times = f"batch 1, accumulated {sparing['accumulation_steps']} times"
        if by_pass:
            yield f"{times}, and {_words(sparing) or 'the rest as it is'}", changed(**sparing)
    if by_states and workload.optimizer in ("adamw", "muon"):
        yield "optimizer=adamw8bit besides", changed(**sparing, optimizer="adamw8bit")
    frozen = (
        isinstance(workload, TuneWorkload)
        and not workload.needs_all_weights
        and workload.precision not in ("master", "rotated8")
    )
    if frozen and isinstance(workload, TuneWorkload) and workload.method not in PACKED:
        if by_states and workload.method == "full":
            yield "method=lora besides", changed(**sparing, method="lora")
        yield "method=qlora besides (the base in 4 bits)", changed(**sparing, method="qlora")


def _keeps_nothing(workload: TuneWorkload | TrainWorkload) -> bool:
    """Whether the model's own layers keep nothing for a backward pass."""
    return isinstance(workload, TuneWorkload) and workload.method == "side"


def _some_layers(question: TrainingQuestion, sparing: Mapping[str, object]) -> dict[str, object] | None:
    """The layers that need to recompute, on one rank; None where even all are too few."""
    if question.parallel.ranks > 1 or question.tensor_bytes is None:
        return None
    from haversack.plan.recompute import choose_recomputation  # with scipy's optimizers, a tenth of a plan's time

    workload = dataclasses.replace(question.workload, **sparing)  # type: ignore[arg-type]
    found = choose_recomputation(question.model, workload, question.tensor_bytes)
    return None if found is None else {"recompute": found[0].recompute}


def _words(sparing: Mapping[str, object]) -> str:
    """Settings that change no result, as they are written."""
    return " and ".join(f"{name}={value}" for name, value in sparing.items() if name in ("loss", "recompute", "update"))
