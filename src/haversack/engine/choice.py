"""What a user asks of the choice of tokens, checked before anything heavy is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass

from haversack.errors import UsageError


@dataclass(frozen=True)
class Choice:
    """What the user asks of the choice; None leaves it to the model's generation config. Temperature 0 is greedy.

    Raises UsageError for what is out of range.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise UsageError(f"--temperature is {self.temperature:g}, but must be a number of at least 0; 0 is greedy.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p is {self.top_p:g}, but must lie above 0 and at most at 1.")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"--top-k is {self.top_k}, but must be at least 1.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed is {self.seed}, but must be a whole number from 0 to 2^63 - 1.")
