"""Grids without kernels of their own: products and rows come from decoding tiles of rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from haversack.parts.weights.base import Grid

if TYPE_CHECKING:
    import torch


class DecodedGrid(Grid):
    """A grid that says how rows are read from its stored tensors; everything else follows, in bounded workspace."""

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
