"""The plan file: site -> option, what each costs and why it won, and the prediction, hashed before anything loads.

A plan is data. It round-trips through JSON, diffs, travels, and is validated field by field when read: a file edited by
hand is refused with the field named. `prediction_hash` covers the choices and the prediction, so that what `verify` compares
with is what was promised.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from haversack.describe.workload import ServeWorkload
from haversack.errors import HaversackError, PlanError
from haversack.ledger import Ledger
from haversack.parts.base import part_from_dict
from haversack.parts.kv.base import KVOption
from haversack.parts.placement.base import Placement
from haversack.parts.weights.base import WeightOption


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DamageRecord(_Strict):
    """Nats per token with its label; `low` and `high` are the range where one is known. `probes` are nats per answer token by
    kind of probe, where plans are judged by the worst of them."""

    nats: float | None
    label: Literal["measured", "proxied", "cited", "unknown"]
    low: float | None = None
    high: float | None = None
    source: str = ""
    probes: dict[str, float] = {}

    @property
    def worst_probe(self) -> str | None:
        """The kind of probe that loses most."""
        return max(self.probes, key=lambda kind: self.probes[kind], default=None)


class WeightChoice(_Strict):
    """One weight site's option."""

    site: str
    role: str
    layer: int | None
    num_parameters: int = Field(ge=1)
    option: dict[str, Any]
    placement: dict[str, Any]
    stored_bytes: int = Field(ge=0)
    neutral_bytes: int = Field(ge=0)
    damage: float | None
    seconds: float = Field(ge=0)
    why: str


class KVChoice(_Strict):
    """One layer's keys and values."""

    site: str
    layer: int
    option: dict[str, Any]
    stored_bytes: int = Field(ge=0)
    neutral_bytes: int = Field(ge=0)
    damage: float | None
    why: str


class Prediction(_Strict):
    """What the run will take. `timeline` is time point -> resident -> tier -> bytes."""

    timeline: dict[str, dict[str, dict[str, int]]]
    peak_bytes: int = Field(ge=0)
    peak_time_point: str
    tensor_peak_bytes: int = Field(ge=0)
    disk_bytes: int = Field(ge=0)
    seconds_per_token: float = Field(ge=0)
    prefill_seconds: float = Field(ge=0)
    load_seconds: float = Field(ge=0)
    damage: DamageRecord


class ModelRecord(_Strict):
    """`source` is where the unpacked model was: a folder's absolute path, or a hub id with its revision."""

    name: str
    source: str
    architecture: str
    fingerprint: str
    dtype: str
    num_parameters: int
    num_bytes: int


class Budget(_Strict):
    """`process` counts the whole process's peak, `tensor` our tensors only. `num_bytes` None: the question was inverted."""

    kind: Literal["process", "tensor"]
    num_bytes: int | None = Field(default=None, gt=0)
    max_damage: float | None = None


class Solve(_Strict):
    """How the solver got there."""

    method: str
    gap: float | None
    seconds: float
    num_groups: int
    num_choices: int
    evaluations: int = 0


class Plan(_Strict):
    """A whole plan for serving. `recipes` are those that the question was restricted to."""

    version: Literal[1] = 1
    haversack: str
    model: ModelRecord
    machine: dict[str, Any]
    workload: dict[str, Any]
    budget: Budget
    prefill_chunk_tokens: int = Field(ge=1)
    weights: tuple[WeightChoice, ...]
    kv: tuple[KVChoice, ...]
    prediction: Prediction
    solve: Solve
    recipes: tuple[str, ...] = ()
    front: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    prediction_hash: str = ""

    def computed_hash(self) -> str:
        """SHA-256 over the canonical JSON of the model, workload, choices and prediction."""
        data = self.model_dump(mode="json", include={"version", "model", "workload", "budget", "prefill_chunk_tokens"})
        data["weights"] = [[w.site, w.option, w.placement, w.stored_bytes] for w in self.weights]
        data["kv"] = [[k.site, k.option, k.stored_bytes] for k in self.kv]
        data["prediction"] = self.prediction.model_dump(mode="json")
        if not self.prediction.damage.probes:  # as in plans from before there were probes
            del data["prediction"]["damage"]["probes"]
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def sealed(self) -> Plan:
        """This plan with its hash filled in."""
        return self.model_copy(update={"prediction_hash": self.computed_hash()})

    @property
    def ledger(self) -> Ledger:
        return Ledger.from_dict(self.prediction.timeline)

    def to_json(self) -> str:
        return self.model_dump_json(indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "the plan") -> Plan:
        """Parse and check. Raises PlanError naming the first wrong field, or a hash that does not match."""
        try:
            plan = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the file"
            raise PlanError(
                f"{where} is not a valid plan: {field}: {first['msg']}; have `haversack plan -o` write it again."
            ) from None
        if plan.prediction_hash != plan.computed_hash():
            raise PlanError(
                f"{where} was changed after it was made: its hash is {plan.computed_hash()[:12]}, "
                f"but it says {plan.prediction_hash[:12] or 'nothing'}; make a new plan instead of editing one."
            )
        try:
            plan._check_meaning()
        except (HaversackError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise PlanError(f"{where} holds what no plan can: {' '.join(str(error).split()).rstrip('.')}.") from None
        return plan

    def _check_meaning(self) -> None:
        """What types alone can't say: options and placements are built, the workload and the timeline are read."""
        for row in self.weights:
            WeightOption.from_dict(row.option)
            placement = part_from_dict(row.placement)
            if not isinstance(placement, Placement):
                raise PlanError(f"{row.site} has the placement {placement.id!r}, which is none")
        for kv in self.kv:
            KVOption.from_dict(kv.option)
        ServeWorkload.from_dict(self.workload)
        if self.prediction.peak_time_point not in self.prediction.timeline or "load" not in self.prediction.timeline:
            raise PlanError("the timeline lacks its peak, or loading")

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        path = Path(path)
        try:
            text = path.read_bytes()
        except OSError as error:
            raise PlanError(f"can't read the plan {path}: {error.strerror}.") from None
        return cls.from_json(text, str(path))
