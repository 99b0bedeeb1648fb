"""Private memory, read once at load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from haversack.parts.placement.base import Placement


@dataclass(frozen=True)
class Resident(Placement):
    """Stored tensors in private, 64-byte aligned memory: all their bytes count against the budget, always."""

    id: ClassVar[str] = "resident"
    title: ClassVar[str] = "private memory, read once"
    mode: ClassVar[str] = "resident"
    ledger_owner: ClassVar[str] = "weights"
