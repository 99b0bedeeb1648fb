"""Pages of the file itself, evictable by the operating system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from haversack.parts.placement.base import Placement


@dataclass(frozen=True)
class Mapped(Placement):
    """Stored tensors in pages mapped from the file.

    The pages are clean and evictable, so that they have a line of their own and no private bytes; when the system
    needs the memory they are read again from disk at the next token.
    """

    id: ClassVar[str] = "mapped"
    title: ClassVar[str] = "mapped from the file"
    mode: ClassVar[str] = "mapped"
    ledger_owner: ClassVar[str] = "weights (mapped)"
