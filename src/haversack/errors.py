"""Every error Haversack raises on purpose, in one tree.

A leaf also inherits the built-in that a caller would expect (`ValueError`, `FileNotFoundError`, `MemoryError`). A message
is one sentence, or two: what was asked, what was found with its unit, the limit, and the way out. The command line prints
the message alone and exits with `exit_code`: 1 is an answer ("does not fit") or a failed job, 2 is wrong usage,
130 is an interruption that can be resumed.
"""

from __future__ import annotations

from typing import Any


class HaversackError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class UsageError(HaversackError, ValueError):
    """What was asked makes no sense before looking at any model or machine (bad budget, unknown option)."""

    exit_code = 2


class ModelNotFoundError(HaversackError, FileNotFoundError):
    """No such local folder and no such hub id, or the folder has no `config.json`."""

    exit_code = 2

    def __str__(self) -> str:  # FileNotFoundError would print errno fields
        return str(self.args[0]) if self.args else ""


class UnsupportedModelError(HaversackError, NotImplementedError):
    """The architecture is unknown, needs remote code, or its attention can't be reached."""


class CheckpointError(HaversackError, ValueError):
    """A checkpoint's files are missing, truncated, mis-shaped, foreign or not finite."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle checkpoint: loading it could run code, so it is refused."""


class DoesNotFitError(HaversackError, MemoryError):
    """No plan keeps the budget; carries what is short and the cheapest change that would fit.

    `shortfall_bytes` is the smallest feasible peak minus the budget. `owners` maps resident to bytes at the smallest
    feasible peak. `cheapest_change` is one sentence, or None where none is known.
    """

    def __init__(
        self,
        message: str,
        *,
        budget_bytes: int = 0,
        shortfall_bytes: int = 0,
        owners: dict[str, int] | None = None,
        cheapest_change: str | None = None,
    ):
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.shortfall_bytes = shortfall_bytes
        self.owners = owners or {}
        self.cheapest_change = cheapest_change


class PlanError(HaversackError, ValueError):
    """A plan or packed folder is malformed, edited by hand, or was made for another model or version."""


class MachineError(HaversackError, ValueError):
    """A named or described machine is unknown or contradicts itself."""

    exit_code = 2


class OutputError(HaversackError, OSError):
    """The output can't be written: it exists already, is read-only, or the disk is full."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class MissingDependencyError(HaversackError, ImportError):
    """An optional library is not installed; the message names its install line."""


class InterruptedJobError(HaversackError):
    """The user stopped a job; finished work is kept and `resume` says how to go on."""

    exit_code = 130

    def __init__(self, message: str, *, resume: str | None = None, **details: Any):
        super().__init__(message)
        self.resume = resume
        self.details = details
