"""How a tuning or training run goes, apart from what decides its bytes: steps, learning rate, evaluation, checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from haversack.errors import UsageError

SCHEDULES = ("cosine", "linear", "constant")

DEFAULT_LEARNING_RATES = {
    "full": 2e-5,
    "lora": 2e-4,
    "qlora": 2e-4,
    "lq-lora": 2e-4,
    "peqa": 2e-5,
    "paca": 2e-4,
    "side": 3e-4,
    "train": 3e-4,
    "full on pairs": 5e-7,
    "lora on pairs": 5e-6,
    "qlora on pairs": 5e-6,
    "lq-lora on pairs": 5e-6,
    "peqa on pairs": 5e-7,
    "paca on pairs": 5e-6,
    "side on pairs": 5e-6,
}
"""Of AdamW by method: full tuning as in Alpaca (Taori et al. 2023), adapters as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314,
table 9, up to 13B), training (and side networks, which are new, too) as in Llama (Touvron et al. 2023, arXiv 2302.13971, table 2, its small models), preferences as in Zephyr (Tunstall et al. 2023,
arXiv 2310.16944, section 4.3), and ten times that for adapters, as between the others. Scales, which stand for
whole groups of weights, have full tuning's."""


@dataclass(frozen=True)
class TrainingSettings:
    """`rows_per_step` rows make one step of the optimizer, whatever the micro-batch. `steps` None goes through the data
    `epochs` times. `learning_rate` None is the method's default. `warmup` is a share of the steps. `clip_norm` 0 leaves gradients as
    they are. `holdout` is the share of rows that are held back and evaluated. `evaluate_every` and `save_every` count steps; None is a tenth of
    the run. Raises UsageError naming the field, its value and what is allowed.
    """

    rows_per_step: int = 8
    steps: int | None = None
    epochs: float = 1.0
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.03
    clip_norm: float = 1.0
    seed: int = 0
    holdout: float = 0.0
    evaluate_every: int | None = None
    save_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows_per_step", "steps", "evaluate_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, but must be a whole number of at least 1.")
        for name, least, most in (
            ("epochs", 0.0, 1e6),
            ("learning_rate", 0.0, 1e3),
            ("warmup", 0.0, 1.0),
            ("clip_norm", 0.0, math.inf),
            ("holdout", 0.0, 0.5),
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and least <= value <= most):
                raise UsageError(f"{name} is {value:g}, but must be a number from {least:g} to {most:g}.")
        if self.epochs == 0:
            raise UsageError("epochs is 0, but something must be trained on; ask for more.")
        if self.schedule not in SCHEDULES:
            raise UsageError(f"schedule is {self.schedule!r}, but must be one of {', '.join(SCHEDULES)}.")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}, but must be a whole number from 0 to 2^63 - 1.")

    def resolved(self, num_rows: int, learning_rate: float) -> TrainingSettings:
        """With steps, rate and intervals as numbers, for `num_rows` rows to train on; `learning_rate` where none was asked."""
        steps = self.steps or max(1, math.ceil(self.epochs * num_rows / self.rows_per_step))
        tenth = max(1, steps // 10)
        return dataclasses.replace(
            self,
            steps=steps,
            learning_rate=learning_rate if self.learning_rate is None else self.learning_rate,
            evaluate_every=self.evaluate_every or tenth,
            save_every=self.save_every or tenth,
        )

    @property
    def num_steps(self) -> int:
        """Steps of a resolved run."""
        assert self.steps is not None, "settings are resolved before a run"
        return self.steps

    @property
    def save_every_steps(self) -> int:
        """Of a resolved run."""
        assert self.save_every is not None, "settings are resolved before a run"
        return self.save_every

    @property
    def evaluate_every_steps(self) -> int:
        """Of a resolved run."""
        assert self.evaluate_every is not None, "settings are resolved before a run"
        return self.evaluate_every

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup * self.num_steps)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingSettings:
        return cls(**data)
