"""On disk until the layer runs, read ahead through a window of buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from haversack.parts.base import Source, check_range
from haversack.parts.placement.base import Placement


@dataclass(frozen=True)
class Streamed(Placement):
    """Stored tensors read from disk layer by layer, every token, the next layer while the present one computes.

    Memory: `num_buffers` times the largest layer's streamed bytes, whatever the depth. Time: all streamed bytes over the
    disk's read rate per token, overlapped with the compute.
    """

    num_buffers: int = 2

    id: ClassVar[str] = "streamed"
    title: ClassVar[str] = "streamed from disk through a window"
    mode: ClassVar[str] = "streamed"
    ledger_owner: ClassVar[str] = "weights (stream window)"
    source: ClassVar[Source | None] = Source(
        "Li et al.", 2024, "TPI-LLM: Serving 70B-scale LLMs Efficiently on Low-resource Edge Devices", "2410.00531"
    )
    catalogue: ClassVar[tuple[str, ...]] = ("tpi-llm", "superpipeline")

    def __post_init__(self) -> None:
        check_range(self.id, "num_buffers", self.num_buffers, "2 or more", self.num_buffers >= 2)
