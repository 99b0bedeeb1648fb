"""What is asked, and what is answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from haversack.cost.damage import Damage
from haversack.describe.machine import Machine
from haversack.describe.model import Model
from haversack.describe.workload import ServeWorkload
from haversack.errors import DoesNotFitError
from haversack.parts.kv.base import KVOption
from haversack.parts.weights.base import WeightOption
from haversack.plan.schema import Plan
from haversack.units import format_bytes

DEFAULT_RUNTIME_BYTES = 280 * 2**20
"""Private bytes of a process that has imported torch 2.13 (CPU) and transformers 5.23, where this machine's own figure
was never measured. Plans that use it say so."""

PlacementPolicy = Literal["auto", "resident", "mapped", "streamed"]


@dataclass(frozen=True)
class Question:
    """What is asked: a model, a workload and a machine, within `budget_bytes` or at most `max_damage` nats.

    `budget_kind` "process" counts the whole process's peak, "tensor" our tensors only. `placement` "auto" keeps weights
    resident and streams from disk only where nothing resident fits. `lossless` offers only what changes no value.
    `recipes` are ids: of weights and caches, those that one is for are offered nothing but such recipes and `as is`.
    """

    model: Model
    workload: ServeWorkload
    machine: Machine
    budget_bytes: int | None
    budget_kind: Literal["process", "tensor"] = "process"
    max_damage: float | None = None
    placement: PlacementPolicy = "auto"
    weight_damages: Mapping[str, Mapping[WeightOption, Damage]] | None = None
    kv_damages: Mapping[str, Mapping[KVOption, Damage]] | None = None
    lossless: bool = False
    recipes: tuple[str, ...] = ()

    @property
    def runtime_bytes(self) -> int:
        if self.budget_kind == "tensor":
            return 0
        return self.machine.rates.runtime_private_bytes or DEFAULT_RUNTIME_BYTES


@dataclass(frozen=True)
class Answer:
    """A plan and whether it fits. Where nothing fits, the plan is the smallest there is and `shortfall_bytes` is positive."""

    plan: Plan
    fits: bool
    shortfall_bytes: int
    cheapest_change: str | None = None

    @property
    def problem(self) -> str:
        """What is in the way, in one sentence: bytes where they are short, else the other bounds that nothing keeps."""
        prediction, budget = self.plan.prediction, self.plan.budget
        bounds = []
        if budget.max_damage is not None:
            bounds.append(f"at most {budget.max_damage:g} nats per token")
        if (speed := self.plan.workload.get("min_tokens_per_second")) is not None:
            bounds.append(f"at least {speed:g} tokens/s")
        if not self.shortfall_bytes:
            within = f" within {format_bytes(budget.num_bytes)}" if budget.num_bytes else ""
            return f"No plan for {self.plan.model.name} keeps {' and '.join(bounds) or 'what was asked'}{within}."
        owners = self.plan.ledger.owners_at(prediction.peak_time_point)
        largest = ", ".join(f"{owner} {format_bytes(n)}" for owner, n in list(owners.items())[:3])
        under = f" at {' and '.join(bounds)}" if bounds else ""
        return (
            f"{self.plan.model.name} needs {format_bytes((budget.num_bytes or 0) + self.shortfall_bytes)} at {prediction.peak_time_point} "
            f"({largest}) or more{under}, but the budget is {format_bytes(budget.num_bytes or 0)}: "
            f"{format_bytes(self.shortfall_bytes)} short."
        )

    def require_fit(self) -> Plan:
        """The plan. Raises DoesNotFitError with shortfall, owners and the cheapest change."""
        if self.fits:
            return self.plan
        prediction, budget = self.plan.prediction, self.plan.budget.num_bytes or 0
        raise DoesNotFitError(
            self.problem,
            budget_bytes=budget,
            shortfall_bytes=self.shortfall_bytes,
            owners=self.plan.ledger.owners_at(prediction.peak_time_point),
            cheapest_change=self.cheapest_change,
        )
