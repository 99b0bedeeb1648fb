"""A datatype per group: each group of columns takes the best of four small sets of values, and says which."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, ClassVar

from haversack.codecs.bitpack import UNIT_COLUMNS, packed_row_bytes
from haversack.errors import CheckpointError
from haversack.ledger import StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.weights.decoded import DecodedGrid
from haversack.parts.weights.scale_search import BLOCK_ELEMENTS, group_importance, search_scales

if TYPE_CHECKING:
    import torch

_FLOATS = {3: (0.0, 1.0, 2.0, 4.0), 4: (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)}
"""Magnitudes of 3- and 4-bit floats (the latter doubled): with a sign they leave one code free, which said -0."""

_SPECIAL = {3: (3.0, -3.0, 6.0, -6.0), 4: (10.0, -10.0, 16.0, -16.0)}
"""What the free code stands for, by type: a finer step near the end or a longer reach, on either side."""

NUM_TYPES, _TYPES_PER_BYTE = 4, 4

_SMALLEST_SHRINK, _NUM_SHRINKS = {3: 0.55, 4: 0.65}, {3: 14, 4: 12}
"""Range of clipping that is searched, as for other tables of these bits (`parts/weights/codebook.py`)."""


@dataclass(frozen=True)
class TypedGrid(DecodedGrid):
    """Floats of `bits` (3 or 4) with one special value, which of four is said per group: stores `bits + 18 / group_size` bits per weight.

    A group of `group_size` (16, 32, 64 or 128, 0 for a row) columns has a float16 scale and a type of 2 bits, four of them to a byte
    (rows padded to whole bytes). Scale and type are those of least importance-weighted squared error. Error: half the
    distance of neighbouring values times the scale, without clipping. Source: Chen et al. 2024 (arXiv 2411.11745, section
    III); differs in searching each type's clipping, and in plain 16-bit scales.
    """

    id: ClassVar[str] = "typed"
    title: ClassVar[str] = "the best of four datatypes per group"
    source: ClassVar[Source | None] = Source(
        "Chen, AbouElhamayed, Dai, Wang, Andronic, Constantinides, Abdelfattah",
        2024,
        "BitMoD: Bit-serial Mixture-of-Datatype LLM Acceleration",
        "2411.11745",
        "section III",
    )

    bits: int = 4
    group_size: int = 128
    scales: ClassVar[str] = "f16"  # type: ignore[misc]

    def __post_init__(self) -> None:
        check_range(self.id, "bits", self.bits, "3 or 4", not isinstance(self.bits, bool) and self.bits in _FLOATS)
        self.check_groups()

    @property
    def label(self) -> str:
        return f"typed{self.bits} " + (f"g{self.group_size}" if self.group_size else "per row")

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        type_bytes = -(-self.num_groups(in_features) // _TYPES_PER_BYTE)
        return (*super().stored(out_features, in_features), StoredTensor("types", "U8", (out_features, type_bytes)))

    @cached_property
    def tables(self) -> torch.Tensor:
        """Values `(types, codes)`, each row rising."""
        import torch

        floats = [*_FLOATS[self.bits], *(-value for value in _FLOATS[self.bits] if value)]
        return torch.tensor([sorted([*floats, special]) for special in _SPECIAL[self.bits]])

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """`scales` float16 and `types` uint8, both `(out, groups)`, of `weight` `(out, in)`; `importance` is `(in,)`.

        Raises CheckpointError for values that are not finite, or beyond what float16 scales can hold.
        """
        import torch
        import torch.nn.functional as F

        in_features = weight.shape[1]
        largest = weight.abs().amax().item() if weight.numel() else 0.0
        if not math.isfinite(largest) or largest > self.coding.largest:
            raise CheckpointError(
                f"a weight matrix holds {largest:.4g}, beyond {self.coding.largest:.4g}, the largest scale that float16 can hold; keep it in its "
                "own dtype."
            )
        groups, padded = self.num_groups(in_features), self.padded_features(in_features)
        weighting = group_importance(importance, in_features, padded, groups)
        states = []
        for block in weight.split(max(1, BLOCK_ELEMENTS // padded)):
            states.append(
                self._fit(F.pad(block.float(), (0, padded - in_features)).view(-1, groups, padded // groups), weighting)
            )
        scales, types = (torch.cat(each) for each in zip(*states, strict=True))
        return {"scales": scales, "types": types}

    def _fit(self, weight: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and types of `weight` `(rows, groups, width)`."""
        import torch

        steps, smallest = _NUM_SHRINKS[self.bits], _SMALLEST_SHRINK[self.bits]
        found, errors = [], []
        for number, table in enumerate(self.tables):
            reach = torch.maximum(weight.amax(-1).clamp_min(0) / table[-1], weight.amin(-1).clamp_max(0) / table[0])
            offers = [reach * (1 - (1 - smallest) * step / (steps - 1)) for step in range(steps)]
            best = search_scales(weight, importance, partial(_nearest_values, table=table), offers).half()
            kind = torch.full(best.shape, number, dtype=torch.uint8)
            change = weight - self._rounded(weight, best.float()[..., None], kind[..., None])
            found.append(best)
            errors.append((change.square() * importance).sum(-1))
        types = torch.stack(errors).argmin(0)
        return torch.stack(found).gather(0, types[None])[0], types.to(torch.uint8)

    def _rounded(self, weight: torch.Tensor, scale: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        return self._values(self._codes(weight, scale, types), types).mul_(scale)

    def _codes(self, weight: torch.Tensor, scale: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        """Nearest codes, uint8, under scales and types that broadcast over `weight`."""
        import torch

        x = weight * torch.where(scale == 0, 0.0, 1.0 / scale)
        codes = _nearest(x, self.tables[0])
        for number in range(1, NUM_TYPES):
            codes = torch.where(types == number, _nearest(x, self.tables[number]), codes)
        return codes.to(torch.uint8)

    def _values(self, codes: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        """Values at scale 1, float32, of codes under types that broadcast over them."""
        import torch

        places = codes.int().add_(types.int() << self.bits)
        return torch.index_select(self.tables.view(-1).to(codes.device), 0, places.view(-1)).view(places.shape)

    def quantize(self, weight: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0) -> torch.Tensor:
        return self._codes(weight.float(), *self._of_columns(scales, first_column, weight.shape[1]))

    def dequantize(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0
    ) -> torch.Tensor:
        scale, types = self._of_columns(scales, first_column, codes.shape[1])
        return self._values(codes, types).mul_(scale)

    def _of_columns(
        self, scales: Mapping[str, torch.Tensor], first_column: int, num_columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales, float32, and types of some columns: `(out, columns)`, or `(out, 1)` where they share a group."""
        import torch

        width = self.group_size or first_column + num_columns
        first, last = first_column // width, (first_column + num_columns - 1) // width
        groups = (
            torch.arange(first_column, first_column + num_columns) // width if last > first else torch.tensor([first])
        )
        return scales["scales"][:, groups].float(), scales["types"][:, groups]

    def pack(self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch.nn.functional as F

        types = scales["types"]
        places = F.pad(types, (0, -types.shape[1] % _TYPES_PER_BYTE)).unflatten(1, (-1, _TYPES_PER_BYTE)).unbind(-1)
        packed = places[0] | places[1] << 2 | places[2] << 4 | places[3] << 6
        return {**super().pack(codes, scales), "types": packed.contiguous()}

    def decode(self, tensors: Mapping[str, torch.Tensor], rows: slice | torch.Tensor, in_features: int) -> torch.Tensor:
        import torch

        from haversack.codecs.bitpack import unpack_codes

        padded, groups = self.padded_features(in_features), self.num_groups(in_features)
        codes = unpack_codes(tensors["codes"][rows], self.bits, padded).view(-1, groups, padded // groups)
        packed = tensors["types"][rows]
        types = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(1)[:, :groups]
        values = self._values(codes, types[..., None])
        values *= self.coding.unpack(tensors, rows, groups)[..., None]
        return values.view(-1, padded)[:, :in_features]

    def decode_row_bytes(self, in_features: int) -> int:
        """Packed row, codes as bytes and as places in int32, float32 values; scales and types on their way to those."""
        padded, groups = self.padded_features(in_features), self.num_groups(in_features)
        columns = -(-padded // UNIT_COLUMNS) * UNIT_COLUMNS
        return packed_row_bytes(padded, self.bits) + 10 * columns + 32 * (groups + _TYPES_PER_BYTE)


def _nearest(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Place in a rising table of the value nearest to every number."""
    import torch

    return torch.bucketize(x, (table[1:] + table[:-1]) / 2)


def _nearest_values(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return table[_nearest(x, table)]
