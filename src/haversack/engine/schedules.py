"""Learning rate schedules: a factor between 0 and 1 of the peak rate, as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable

FINAL_FRACTION = 0.1
"""Where cosine and linear decay end, as a share of the peak rate (Hoffmann et al. 2022, arXiv 2203.15556, section 3.1)."""


def constant(progress: float) -> float:
    return 1.0


def linear(progress: float) -> float:
    return 1.0 - (1.0 - FINAL_FRACTION) * progress


def cosine(progress: float) -> float:
    """Loshchilov and Hutter 2016, arXiv 1608.03983, equation 5, without restarts."""
    return FINAL_FRACTION + (1.0 - FINAL_FRACTION) * 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": cosine, "linear": linear, "constant": constant}
"""Name -> factor of the peak rate after a share `progress` (0 to 1) of the steps behind the warm-up."""


def learning_rate_factor(schedule: str, step: int, num_steps: int, warmup_steps: int) -> float:
    """The factor of step number `step` (from 0): a line up to 1 over `warmup_steps`, then the schedule to the last step."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return SCHEDULES[schedule](min(1.0, (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)))
