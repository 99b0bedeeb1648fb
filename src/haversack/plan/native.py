"""Serving left to transformers as it is: what it holds, for models whose cache no option can plan.

Weights lie as the checkpoint has them, the prompt runs whole, and the cache is transformers' own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from haversack.cost.serving import GENERATION_ODDS_BYTES
from haversack.describe.workload import check_positions
from haversack.engine.native_cache import NativeServing, trace_native_serving
from haversack.ledger import DTYPE_BYTES, Ledger, total_bytes
from haversack.plan.question import Question
from haversack.units import format_bytes

CACHE = "keys, values and states"


@dataclass(frozen=True)
class NativeAnswer:
    """What serving takes without a plan, whether it fits, and why nothing was planned."""

    question: Question
    why: str
    serving: NativeServing
    ledger: Ledger
    cheapest_change: str | None = None

    @property
    def peak(self) -> tuple[str, int]:
        return self.ledger.peak()

    @property
    def shortfall_bytes(self) -> int:
        budget = self.question.budget_bytes
        return 0 if budget is None else max(0, self.peak[1] - budget)

    @property
    def fits(self) -> bool:
        return not self.shortfall_bytes


def native_answer(question: Question, why: str) -> NativeAnswer:
    """Raises UsageError beyond the model's positions; UnsupportedModelError where even this is unknown, by name."""
    model, workload = question.model, question.workload
    check_positions(workload, model.max_positions, model.name)
    serving = trace_native_serving(model, batch_size=workload.users, prompt_tokens=workload.prompt_tokens)
    answer = NativeAnswer(question, why, serving, _ledger(question, serving))
    if answer.fits or question.budget_bytes is None:
        return answer
    spare = question.budget_bytes - answer.ledger.total_bytes("load")
    per_user = (answer.peak[1] - answer.ledger.total_bytes("load")) / workload.users
    users = int(spare // per_user) if per_user > 0 else 0
    if users >= 1:
        change = f"About {users} users at once would fit."
    else:
        change = (
            f"A budget of {format_bytes(answer.peak[1])} would do; its matrices alone could be packed, its cache not."
        )
    return dataclasses.replace(answer, cheapest_change=change)


def _ledger(question: Question, serving: NativeServing) -> Ledger:
    model, workload = question.model, question.workload
    steps = max(0, workload.generate_tokens - 1)
    scores = 2 * DTYPE_BYTES["F32"] * workload.users * model.vocab_size
    weights = sum(
        DTYPE_BYTES["F32"] * site.num_parameters
        if f"{site.module}.{site.parameter}" in model.widened
        else site.num_bytes
        for site in model.weights
    )
    ledger = Ledger()
    for point in ("load", "prefill", "decode"):
        if question.runtime_bytes:
            ledger.add(point, "runtime", "device", question.runtime_bytes)
        ledger.add(point, "weights", "device", weights)
        ledger.add(point, "rest", "device", total_bytes(model.held_rest) + total_bytes(model.buffers))
        if point == "load":
            continue
        ledger.add(
            point, "generation", "device", 4 * 8 * workload.users * workload.context_tokens + GENERATION_ODDS_BYTES
        )
        if point == "prefill":
            ledger.add(point, CACHE, "device", serving.cache_bytes(0))
            ledger.add(point, "activations", "device", max(serving.prefill_bytes, scores))
        else:
            ledger.add(point, CACHE, "device", serving.cache_bytes(max(1, steps)))
            working = serving.decode_bytes + serving.widest_growth_bytes(max(1, steps)) + scores
            ledger.add(point, "activations", "device", working)
    return ledger
