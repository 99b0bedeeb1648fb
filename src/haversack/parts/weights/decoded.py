"""Grids of packed codes under coded scales that are read by rows: products come from decoding tiles of rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from haversack.codecs.bitpack import packed_row_bytes
from haversack.codecs.scale_codings import (
    SCALE_CODINGS,
    SUPERBLOCK_COLUMNS,
    F16Scales,
    ScaleCoding,
    SuperblockScales,
    scale_coding,
)
from haversack.ledger import StoredTensor
from haversack.parts.base import check_range
from haversack.parts.weights.base import Grid

if TYPE_CHECKING:
    import torch


class DecodedGrid(Grid):
    """A grid that says how rows are read from its stored tensors; everything else follows, in bounded workspace.

    Codes are packed (`codecs/bitpack.py`); `scales` names how the scales of groups are stored (`codecs/scale_codings.py`).
    """

    scales: str

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        row_bytes = packed_row_bytes(self.padded_features(in_features), self.bits)
        codes = StoredTensor("codes", "U8", (out_features, row_bytes))
        return (codes, *self.coding.stored(out_features, self.num_groups(in_features)))

    def pack(self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch.nn.functional as F

        from haversack.codecs.bitpack import pack_codes

        padding = self.padded_features(codes.shape[1]) - codes.shape[1]
        return {"codes": pack_codes(F.pad(codes, (0, padding)), self.bits), **self.coding.pack(scales)}

    def set_scale(self, scales: dict[str, torch.Tensor], group: int, scale: torch.Tensor) -> torch.Tensor:
        return self.coding.set_group(scales, group, scale)

    @property
    def coding(self) -> ScaleCoding:
        """How this grid's scales are stored."""
        return scale_coding(self.scales, self.group_size)

    @property
    def float_scales(self) -> str | None:
        if isinstance(self.coding, SuperblockScales):
            return "superscales"
        return "scales" if isinstance(self.coding, F16Scales) else None

    def scale_columns(self, in_features: int) -> int:
        if isinstance(self.coding, SuperblockScales):
            return SUPERBLOCK_COLUMNS
        return self.group_size or in_features

    def check_groups(self) -> None:
        """Raise UsageError for a group size or a coding of scales that there is not."""
        check_range(
            self.id,
            "group_size",
            self.group_size,
            "16, 32, 64, 128, or 0 (the whole row)",
            not isinstance(self.group_size, bool) and self.group_size in (0, 16, 32, 64, 128),
        )
        names = [name for name in SCALE_CODINGS if self.group_size or name in ("f16", "e8m0")]
        check_range(self.id, "scales", self.scales, f"one of {', '.join(names)}", self.scales in names)

    @abstractmethod
    def decode(self, tensors: Mapping[str, torch.Tensor], rows: slice | torch.Tensor, in_features: int) -> torch.Tensor:
        """Some rows of the matrix, float32 `(rows, in_features)`, from the stored tensors."""

    @abstractmethod
    def decode_row_bytes(self, in_features: int) -> int:
        """The most bytes `decode` allocates per row, its result included."""

    def matmul(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor:
        from haversack.kernels import decoded_tiles

        in_features = x.shape[-1]
        return decoded_tiles.matmul(
            x, lambda rows: self.decode(tensors, rows, in_features), out_features, self.decode_row_bytes(in_features)
        )

    def rows(self, index: torch.Tensor, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        import torch

        from haversack.kernels.decoded_tiles import tile_rows

        out = torch.empty(len(index), in_features, device=index.device)
        step = tile_rows(self.decode_row_bytes(in_features))
        for first in range(0, len(index), step):
            out[first : first + step] = self.decode(tensors, index[first : first + step], in_features)
        return out

    def workspace_bytes(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> int:
        from haversack.kernels.decoded_tiles import workspace_bytes

        return workspace_bytes(self.decode_row_bytes(in_features), num_tokens, out_features, in_features, dtype)

    def rows_bytes(self, num_rows: int, in_features: int) -> int:
        from haversack.kernels.decoded_tiles import tile_rows

        row_bytes = self.decode_row_bytes(in_features)
        return 4 * num_rows * in_features + min(num_rows, tile_rows(row_bytes)) * row_bytes

    def kernel_name(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> str:
        from haversack.kernels.decoded_tiles import NAME

        return NAME

    def decode_seconds(self, num_weights: int) -> float:
        from haversack.kernels.decoded_tiles import SECONDS_PER_WEIGHT

        return num_weights * SECONDS_PER_WEIGHT
