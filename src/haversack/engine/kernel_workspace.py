"""What torch's CPU kernels allocate inside and free again, which no tensor outside shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def workspace_of_kernels() -> dict[Any, Callable[..., int]]:
    """For each operator that takes workspace: a function of its arguments that gives the bytes."""
    return {}
