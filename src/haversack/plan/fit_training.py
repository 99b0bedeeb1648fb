"""How a run fits: of what changes no result the fastest that fits, and only where nothing does, what is rounded or trains less.

Choices come in rungs. The first gives what was asked, in 32-bit states: micro-batch and accumulation, recomputation, and whether weights are
updated during the backward pass, are chosen freely. Each further rung gives something up, says so, and has the same free choices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from haversack.cost.training_seconds import training_seconds
from haversack.describe.workload import ATTENTIONS, RECOMPUTATIONS, TrainWorkload, TuneWorkload
from haversack.engine.cut_loss import cuts
from haversack.engine.training_trace import AttentionError
from haversack.errors import DoesNotFitError
from haversack.plan.recompute import choose_recomputation
from haversack.plan.training import TrainingAnswer, TrainingQuestion, predict_training
from haversack.units import format_bytes

FEWER_STATES = {
    "adamw8bit": "optimizer states are kept in 8 bits",
    "adamw4bit": "optimizer states are kept in 4 bits",
    "apollo-mini": "optimizer states of the layers' matrices are kept at rank 1",
}
"""Optimizer recipes instead of AdamW with whole states, from the most bytes to the fewest."""


@dataclass(frozen=True)
class TrainingFit:
    """The choice: its answer, seconds of a step by the roofline, what was given up, and how many choices were weighed."""

    answer: TrainingAnswer
    seconds_per_step: float
    given_up: tuple[str, ...]
    num_weighed: int

    @property
    def workload(self) -> TuneWorkload | TrainWorkload:
        return self.answer.question.workload


def fit_training(question: TrainingQuestion, pinned: Set[str] = frozenset(), *, clips: bool = True) -> TrainingFit:
    """The fastest choice of the first rung that has one. `question.workload` says what is asked, with the rows of a step as
    its batch; fields in `pinned` stay as they are. `clips` says that gradients are clipped by their norm together, which updates during
    the backward pass can't; without, these give the same result and are used where a step's gradients don't fit. Raises DoesNotFitError
    with the cheapest change where nothing fits."""
    rows = question.workload.batch_size * question.workload.accumulation_steps
    micro_batches = [n for n in range(1, rows + 1) if rows % n == 0]
    if "accumulation_steps" in pinned:
        micro_batches = [question.workload.batch_size]
    if question.workload.update == "backward":
        micro_batches = [rows]  # each gradient is used up at once, so none accumulate
    question = _with_attention(question, pinned)
    ways = _ways(question, pinned)
    weigh = _Weighing(question, rows)
    best_effort: TrainingAnswer | None = None
    in_backward = question.workload.update == "step" and not pinned & {"update", "accumulation_steps"}
    if question.workload.saved == "resting":
        in_backward = False
    if question.parallel.ranks > 1:
        in_backward = False
        pinned = pinned | {"optimizer"}  # those of fewer states work on whole matrices, or on blocks of them
    for given_up, fields in _rungs(question.workload, pinned):
        least = weigh(fields, ways[-1], micro_batches[0])
        some = [*_fitting(weigh, fields, ways, micro_batches)] if least.fits else []
        if not some and in_backward and not clips:
            some = [*_fitting(weigh, {**fields, "update": "backward"}, ways, [rows])]
        if some:
            answer = min(some, key=weigh.seconds)
            if "recompute" not in pinned and question.parallel.ranks == 1:
                answer = weigh.fewer_layers(answer)
            return TrainingFit(answer, weigh.seconds(answer), given_up, weigh.num_weighed)
        if best_effort is None or least.shortfall_bytes < best_effort.shortfall_bytes:
            best_effort = least
    assert best_effort is not None
    change = _cheapest_change(best_effort)
    if in_backward and clips and any(_fitting(weigh, {"update": "backward"}, ways, [rows])):
        change = "It would fit with --clip 0: weights are then updated during the backward pass, and gradients never held together."
    raise DoesNotFitError(
        f"even with {_settings(best_effort)} {best_effort.problem}",
        budget_bytes=question.budget_bytes or 0,
        shortfall_bytes=best_effort.shortfall_bytes,
        owners=best_effort.ledger.owners_at(best_effort.ledger.peak()[0]),
        cheapest_change=change,
    )


def _with_attention(question: TrainingQuestion, pinned: Set[str]) -> TrainingQuestion:
    """The question with plain attention, where the family has no fused one and the user asked for none."""
    smallest: dict[str, Any] = {"batch_size": 1, "accumulation_steps": 1, "seq_len": 2}
    if "attention" in pinned:
        return question
    for attention in dict.fromkeys((question.workload.attention, *ATTENTIONS)):
        tried = dataclasses.replace(question, workload=dataclasses.replace(question.workload, attention=attention))
        try:
            predict_training(dataclasses.replace(tried, workload=dataclasses.replace(tried.workload, **smallest)))
        except AttentionError:
            continue
        return tried
    return question  # every try fails alike: let it be told


def _ways(question: TrainingQuestion, pinned: Set[str]) -> list[dict[str, str]]:
    """Recomputation and loss, from the fastest to the one that holds the least; all give the same result."""
    keeps_nothing = isinstance(question.workload, TuneWorkload) and question.workload.method == "side"
    fixed = "recompute" in pinned or question.workload.saved != "exact" or keeps_nothing
    recomputations = (question.workload.recompute,) if fixed else RECOMPUTATIONS
    losses: tuple[str, ...] = (question.workload.loss,)
    if "loss" not in pinned and question.workload.loss == "fp32" and cuts(question.model):
        losses = ("fp32", "cut")
    return [{"recompute": recompute, "loss": loss} for recompute in recomputations for loss in losses]


def _rungs(
    workload: TuneWorkload | TrainWorkload, pinned: Set[str]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """(what is given up, fields): from nothing to the most."""
    yield (), {}
    if isinstance(workload, TuneWorkload) and "method" not in pinned and not workload.needs_all_weights:
        methods = ["full", "lora", "qlora"]
    else:
        methods = [workload.method] if isinstance(workload, TuneWorkload) else [""]
    for method in methods[methods.index(workload.method) if isinstance(workload, TuneWorkload) else 0 :]:
        lost = {"lora": ("low-rank adapters are trained instead of all weights",),
                "qlora": ("low-rank adapters are trained instead of all weights", "the base is rounded to 4 bits")}  # fmt: skip
        asked = not isinstance(workload, TuneWorkload) or method == workload.method
        given_up = () if asked else lost[method]
        fields: dict[str, Any] = {} if asked else {"method": method}
        if not asked:
            yield given_up, fields
        if "optimizer" not in pinned and workload.optimizer == "adamw" and method in ("full", ""):
            for optimizer, reduced in FEWER_STATES.items():
                yield (*given_up, reduced), {**fields, "optimizer": optimizer}


class _Weighing:
    """Answers by rung, way and micro-batch, each predicted once."""

    def __init__(self, question: TrainingQuestion, rows: int):
        self.question = question
        self.rows = rows
        self._answers: dict[TuneWorkload | TrainWorkload, TrainingAnswer] = {}

    def __call__(self, fields: Mapping[str, Any], way: Mapping[str, str], micro_batch: int) -> TrainingAnswer:
        shape = {"batch_size": micro_batch, "accumulation_steps": self.rows // micro_batch, **way}
        workload = dataclasses.replace(self.question.workload, **{**fields, **shape})
        if workload not in self._answers:
            self._answers[workload] = predict_training(dataclasses.replace(self.question, workload=workload))
        return self._answers[workload]

    def seconds(self, answer: TrainingAnswer) -> float:
        """Of a step, by the roofline."""
        return training_seconds(self.question.model, answer.cost, self.question.machine)

    def fewer_layers(self, answer: TrainingAnswer) -> TrainingAnswer:
        """The same with as few layers run twice as the budget asks, where all are."""
        question = answer.question
        if question.workload.recompute != "full" or question.tensor_bytes is None:
            return answer
        found = choose_recomputation(question.model, question.workload, question.tensor_bytes)
        if found is None:
            return answer
        fewer = predict_training(dataclasses.replace(question, workload=found[0]))
        return fewer if fewer.fits else answer

    @property
    def num_weighed(self) -> int:
        return len(self._answers)


def _fitting(
    weigh: _Weighing, fields: Mapping[str, Any], ways: Sequence[Mapping[str, str]], micro_batches: Sequence[int]
) -> Iterator[TrainingAnswer]:
    """The largest micro-batch that fits in each way, from the fastest way: a larger one reads the weights less often. Where
    the largest of all fits, computing more again can't be faster."""
    for way in ways:
        low, high = -1, len(micro_batches)
        while high - low > 1:
            middle = high - 1 if low < 0 and high == len(micro_batches) else (low + high) // 2
            low, high = (middle, high) if weigh(fields, way, micro_batches[middle]).fits else (low, middle)
        if low >= 0:
            yield weigh(fields, way, micro_batches[low])
        if low == len(micro_batches) - 1:
            return


def _settings(answer: TrainingAnswer) -> str:
    workload = answer.question.workload
    method = f"method {workload.method}, " if isinstance(workload, TuneWorkload) else ""
    return (
        f"{method}{workload.batch_size} x {workload.seq_len} tokens, recompute {workload.recompute}, loss {workload.loss}, "
        f"{workload.optimizer}"
    )


def _cheapest_change(answer: TrainingAnswer) -> str:
    """Shorter rows, if half of them would do; else the budget that would."""
    question = answer.question
    length = question.workload.seq_len
    while length >= 32:
        length //= 2
        workload = dataclasses.replace(question.workload, seq_len=length)
        if predict_training(dataclasses.replace(question, workload=workload)).fits:
            return f"It would fit with --seq-len {length}, or with a budget of {format_bytes(answer.ledger.peak()[1])}."
    return f"A budget of {format_bytes(answer.ledger.peak()[1])} would do."
