"""The whole contract of a placement: which tier pays, and what each token costs.

Placement changes no value: the same stored tensors lie in private memory, in mapped pages of the file, or on disk until
their layer runs. It applies to a weight site; the engine reads tensors accordingly.
"""

from __future__ import annotations

from typing import ClassVar

from haversack.parts.base import Part


class Placement(Part):
    """A part of the placement resident."""

    resident: ClassVar[str] = "placement"
    stage: ClassVar[str] = "tier"
    lossless: ClassVar[bool] = True
    mode: ClassVar[str]  # "resident", "mapped" or "streamed": what the engine does
    ledger_owner: ClassVar[str]  # the ledger's row for the bytes that stay in memory
