"""Workloads: what a model shall do, in tokens and users. Serving here; tuning and training are classes of their own.

A workload says nothing of a model or a machine, so it is checked in two steps: the numbers against themselves when it
is made, and against a model's positions with `check_positions`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from haversack.errors import PlanError, UsageError


@dataclass(frozen=True)
class ServeWorkload:
    """Generate `generate_tokens` after prompts of `prompt_tokens`, for `users` sequences at once.

    `prefill_chunk_tokens` None leaves the chunk to the planner; `min_tokens_per_second` is a bound on the sum over
    users. Raises UsageError naming the field, its value and what is allowed.
    """

    task: ClassVar[str] = "serve"

    prompt_tokens: int
    generate_tokens: int
    users: int = 1
    prefill_chunk_tokens: int | None = None
    min_tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        _check_count("prompt_tokens", self.prompt_tokens, minimum=1)
        _check_count("generate_tokens", self.generate_tokens, minimum=0)
        _check_count("users", self.users, minimum=1)
        if self.prefill_chunk_tokens is not None:
            _check_count("prefill_chunk_tokens", self.prefill_chunk_tokens, minimum=1)
        speed = self.min_tokens_per_second
        if speed is not None and (
            isinstance(speed, bool) or not isinstance(speed, int | float) or not math.isfinite(speed) or speed <= 0
        ):
            raise UsageError(f"min_tokens_per_second is {speed!r}, but must be a number above zero.")

    @property
    def context_tokens(self) -> int:
        """Positions one user needs: the prompt and everything generated after it."""
        return self.prompt_tokens + self.generate_tokens

    @property
    def cache_tokens(self) -> int:
        """Tokens whose keys and values one user needs: the last generated token is never fed back."""
        return self.prompt_tokens + max(0, self.generate_tokens - 1)

    def prefill_chunks(self, chunk_tokens: int | None = None) -> tuple[int, ...]:
        """Tokens per prefill step: at most `chunk_tokens`, else the workload's own, else the whole prompt at once."""
        step = min(chunk_tokens or self.prefill_chunk_tokens or self.prompt_tokens, self.prompt_tokens)
        full, rest = divmod(self.prompt_tokens, step)
        return (step,) * full + ((rest,) if rest else ())

    def to_dict(self) -> dict[str, Any]:
        """`{"task": "serve", field: value, ...}`, JSON-ready."""
        return {"task": self.task, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ServeWorkload:
        """The workload that `to_dict` wrote. Raises PlanError naming a wrong task or field."""
        fields = dict(data)
        if (task := fields.pop("task", None)) != cls.task:
            raise PlanError(f"the plan's workload has the task {task!r}, but this command reads {cls.task!r}.")
        try:
            return cls(**fields)
        except TypeError as error:
            raise PlanError(f"the plan's workload has wrong fields: {error}.") from None
        except UsageError as error:
            raise PlanError(f"the plan's workload is wrong: {error}") from None


def check_positions(workload: ServeWorkload, max_positions: int | None, model: str) -> None:
    """Raise UsageError if the workload's context is longer than the positions `model` was made for (None: no limit)."""
    if max_positions is not None and workload.context_tokens > max_positions:
        raise UsageError(
            f"{workload.prompt_tokens} prompt and {workload.generate_tokens} generated tokens need "
            f"{workload.context_tokens} positions, but {model} has {max_positions}; "
            f"ask for at most {max_positions} tokens in all."
        )


def _check_count(field: str, value: int, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UsageError(f"{field} is {value!r}, but must be a whole number of at least {minimum}.")
