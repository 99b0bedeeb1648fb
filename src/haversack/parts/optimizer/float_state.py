"""Moments as floats of a given width, whatever the weight's is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.ledger import StoredTensor
from haversack.parts.base import check_range
from haversack.parts.optimizer.base import Moment, StatePrecision

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FloatState(StatePrecision):
    """4 or 2 bytes of a number. In 32 bits beside 16-bit weights nothing of the history is rounded away; in 16 a second
    moment that should shrink by a thousandth stays as it is."""

    id: ClassVar[str] = "float-state"
    title: ClassVar[str] = "moments in 32 or 16 bits, whatever the weight's dtype"

    dtype: str = "F32"

    def __post_init__(self) -> None:
        check_range(self.id, "dtype", self.dtype, "one of F32, BF16", self.dtype in ("F32", "BF16"))

    def stored(self, moment: Moment) -> tuple[StoredTensor, ...]:
        return (StoredTensor(moment.name, self.dtype, moment.shape),)

    def read(
        self, stored: Mapping[str, torch.Tensor], shared: Mapping[str, torch.Tensor], moment: Moment, piece: slice
    ) -> torch.Tensor:
        import torch

        return stored[moment.name].view(-1)[piece].to(torch.float32, copy=True)

    def write(
        self,
        stored: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        moment: Moment,
        piece: slice,
        values: torch.Tensor,
    ) -> None:
        stored[moment.name].view(-1)[piece].copy_(values.reshape(-1))
