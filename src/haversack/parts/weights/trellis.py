"""Trellis codes: a code's value depends on the codes before it, so that a row of few bits names a path among many values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.codecs.bitpack import UNIT_COLUMNS, packed_row_bytes
from haversack.codecs.scale_codings import SUPERBLOCK_COLUMNS
from haversack.codecs.trellis import WINDOW_BITS, trellis_table
from haversack.errors import UsageError
from haversack.parts.base import Source, check_range
from haversack.parts.weights.decoded import DecodedGrid
from haversack.parts.weights.scale_search import root_mean_squares

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrellisGrid(DecodedGrid):
    """Codes of 2, 3 or 4 bits whose values are looked up by the last `WINDOW_BITS` bits of the row: `bits` plus the
    scales' bits per group, per weight.

    The table is the same for every matrix and comes with the package (`codecs/trellis.py`), so that no bytes of a model
    hold it. `group_size` is 16 to 128 columns, or 0 for one scale per row; `scales` names their coding. Columns before
    the first count as code 0. Codes are chosen along whole rows: by `BeamFeedback`, or by nearest rounding, which is
    then a beam search too.

    Error: on normal weights 0.082, 0.022 and 0.0064 of their variance at 2, 3 and 4 bits, where the best scalar codes
    leave 0.118, 0.035 and 0.0095. Source: Tseng et al. 2024 (arXiv 2406.11235, sections 3.1 and 3.2: bitshift trellis);
    differs in the table, trained on normal samples over a window of few bits so that it fits a CPU's registers or first
    cache, in rows as sequences without tail-biting, and in searching within the feedback instead of between blocks.
    """

    id: ClassVar[str] = "trellis"
    title: ClassVar[str] = "trellis codes along each row"
    source: ClassVar[Source | None] = Source(
        "Tseng, Sun, Hou, De Sa",
        2024,
        "QTIP: Quantization with Trellises and Incoherence Processing",
        "2406.11235",
        "section 3",
    )

    bits: int = 2
    group_size: int = 0
    scales: str = "f16"

    def __post_init__(self) -> None:
        check_range(self.id, "bits", self.bits, "2, 3 or 4", self.bits in (2, 3, 4))
        self.check_groups()

    @property
    def label(self) -> str:
        words = [f"trellis{self.bits}", f"g{self.group_size}" if self.group_size else "per row"]
        return " ".join(words + ([self.scales] if self.scales != "f16" else []))

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The scales' working state: each group's root mean square, for the table's values have variance 1."""
        return self.coding.encode(root_mean_squares(weight, self, importance))

    def quantize(self, weight: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0) -> torch.Tensor:
        if first_column:
            raise UsageError(f"{self.id}: codes depend on those before them; round with beam-feedback or nearest.")
        from haversack.parts.weights.beam import nearest_path

        return nearest_path(weight, self, scales)

    def dequantize(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0
    ) -> torch.Tensor:
        if first_column:
            raise UsageError(f"{self.id}: codes depend on those before them; ask for whole rows.")
        return self._unit_values(codes).mul_(self._column_scales(scales, codes.shape[1]))

    @property
    def num_states(self) -> int:
        return 1 << (WINDOW_BITS[self.bits] - self.bits)

    def branches(self, history: torch.Tensor, scales: Mapping[str, torch.Tensor], column: int) -> torch.Tensor:
        import torch

        table = trellis_table(self.bits).view(-1, 1 << self.bits)
        before = history & (len(table) - 1)
        group = column // self.group_size if self.group_size else 0
        scale = self.coding.values(scales, slice(group, group + 1))
        return torch.index_select(table, 0, before.view(-1)).view(*history.shape, -1) * scale[..., None]

    def decode(self, tensors: Mapping[str, torch.Tensor], rows: slice | torch.Tensor, in_features: int) -> torch.Tensor:
        from haversack.codecs.bitpack import unpack_codes

        padded, groups = self.padded_features(in_features), self.num_groups(in_features)
        values = self._unit_values(unpack_codes(tensors["codes"][rows], self.bits, padded))
        grouped = values.view(-1, groups, padded // groups)
        grouped *= self.coding.unpack(tensors, rows, groups)[..., None]
        return values[:, :in_features]

    def decode_row_bytes(self, in_features: int) -> int:
        """Packed row, codes as bytes, windows and a shifted copy as int32, float32 values; and the scales."""
        padded, groups = self.padded_features(in_features), self.num_groups(in_features)
        columns = -(-padded // UNIT_COLUMNS) * UNIT_COLUMNS
        return packed_row_bytes(padded, self.bits) + 14 * columns + 16 * (groups + SUPERBLOCK_COLUMNS // 16)

    def _unit_values(self, codes: torch.Tensor) -> torch.Tensor:
        """float32 values, at scale 1, of uint8 codes `(rows, columns)` of whole rows."""
        import torch

        window_bits = WINDOW_BITS[self.bits]
        windows = codes.int()
        shifted = codes.int()
        for back in range(1, -(-window_bits // self.bits)):
            shifted <<= self.bits
            windows[:, back:] |= shifted[:, :-back]
        windows &= (1 << window_bits) - 1
        del shifted
        table = trellis_table(self.bits).to(codes.device)
        return torch.index_select(table, 0, windows.view(-1)).view(codes.shape)

    def _column_scales(self, scales: Mapping[str, torch.Tensor], num_columns: int) -> torch.Tensor:
        """float32 scales `(out, columns)`, or `(out, 1)`."""
        values = self.coding.values(scales)
        return values.repeat_interleave(self.group_size, 1)[:, :num_columns] if self.group_size else values
