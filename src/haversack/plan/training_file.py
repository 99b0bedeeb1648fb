"""The plan of a tuning or training run as a file: what was asked, what was chosen, what is given up, what is predicted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from haversack.cost.parallel import sharded_bytes
from haversack.describe.training_settings import TrainingSettings
from haversack.describe.workload import TrainWorkload, TuneWorkload, workload_from_dict
from haversack.errors import HaversackError, PlanError
from haversack.ledger import Ledger
from haversack.plan.fit_training import TrainingFit


class TrainingPlan(BaseModel):
    """`fingerprints` are of the model, the data, and what was asked: a run goes on only where all three are the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    model: str
    fingerprints: dict[str, str]
    asked: dict[str, Any]
    workload: dict[str, Any]
    settings: dict[str, Any]
    budget_bytes: int | None
    budget_kind: str
    given_up: tuple[str, ...]
    num_weighed: int
    num_ranks: int = 1
    timeline: dict[str, Any]
    peak_bytes: int
    peak_time_point: str
    resident_bytes: dict[str, int]
    seconds_per_step: float
    prediction_hash: str = ""

    @classmethod
    def of(
        cls,
        fit: TrainingFit,
        settings: TrainingSettings,
        *,
        fingerprints: Mapping[str, str],
        asked: Mapping[str, Any],
    ) -> TrainingPlan:
        """The plan of a choice, its prediction hashed."""
        answer = fit.answer
        point, peak = answer.ledger.peak()
        plan = cls(
            model=answer.question.model.name,
            fingerprints=dict(fingerprints),
            asked=dict(asked),
            workload=fit.workload.to_dict(),
            settings=settings.to_dict(),
            budget_bytes=answer.question.budget_bytes,
            budget_kind=answer.question.budget_kind,
            given_up=fit.given_up,
            num_weighed=fit.num_weighed,
            timeline=answer.ledger.to_dict(),
            peak_bytes=peak,
            peak_time_point=point,
            num_ranks=answer.question.parallel.ranks,
            resident_bytes={
                owner: sharded_bytes(num_bytes, owner, answer.question.parallel)
                for owner, num_bytes in answer.cost.staying.items()
            },
            seconds_per_step=fit.seconds_per_step,
        )
        return plan.model_copy(update={"prediction_hash": plan.computed_hash()})

    def computed_hash(self) -> str:
        """SHA-256 over everything but itself."""
        text = json.dumps(self.model_dump(exclude={"prediction_hash"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def training_workload(self) -> TuneWorkload | TrainWorkload:
        workload = workload_from_dict(self.workload)
        assert isinstance(workload, TuneWorkload | TrainWorkload), "serving has plans of its own"
        return workload

    @property
    def training_settings(self) -> TrainingSettings:
        return TrainingSettings.from_dict(self.settings)

    @property
    def ledger(self) -> Ledger:
        return Ledger.from_dict(self.timeline)

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> TrainingPlan:
        """Raises PlanError for a file that is not what `to_json` wrote."""
        try:
            plan = cls.model_validate_json(path.read_bytes())
            workload_from_dict(plan.workload), TrainingSettings.from_dict(plan.settings)
        except (OSError, ValidationError, HaversackError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:160].rstrip(".")
            raise PlanError(f"{path} is no plan of a training run ({reason}).") from None
        if plan.prediction_hash != plan.computed_hash():
            raise PlanError(
                f"{path} was edited: its prediction is not what was hashed; remove the folder and start again."
            )
        return plan
