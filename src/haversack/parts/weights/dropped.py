"""A dropped matrix: nothing is stored and its product is zero, so that the sublayer it ends adds nothing to what passes it by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source
from haversack.parts.weights.base import Grid

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DroppedGrid(Grid):
    """Every weight is 0 and none is stored.

    Where the matrix that ends attention or a feed-forward block is dropped, those before it in the block are of no use, and are
    dropped with it at no further cost; so is the layer's cache, where it is attention (`parts/kv/nothing.py`). Error: the whole matrix. Source:
    He et al. 2024 (arXiv 2406.15786, section 3).
    """

    id: ClassVar[str] = "dropped"
    title: ClassVar[str] = "nothing stored, and a product of zeros"
    source: ClassVar[Source | None] = Source(
        "He, Sun, Shen, Li",
        2024,
        "What Matters in Transformers? Not All Attention is Needed",
        "2406.15786",
        "section 3",
    )
    group_size: ClassVar[int] = 0  # type: ignore[misc]

    @property
    def bits(self) -> int:
        return 0

    @property
    def label(self) -> str:
        return self.id

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        return ()

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {}

    def quantize(self, weight: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0) -> torch.Tensor:
        import torch

        return torch.zeros_like(weight, dtype=torch.uint8)

    def dequantize(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0
    ) -> torch.Tensor:
        return codes.float()

    def set_scale(self, scales: dict[str, torch.Tensor], group: int, scale: torch.Tensor) -> torch.Tensor:
        return scale * 0

    def pack(self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {}

    def matmul(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], out_features)

    def rows(self, index: torch.Tensor, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        import torch

        return torch.zeros(len(index), in_features, device=index.device)

    def workspace_bytes(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> int:
        return 0

    def rows_bytes(self, num_rows: int, in_features: int) -> int:
        return DTYPE_BYTES["F32"] * num_rows * in_features

    def kernel_name(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> str:
        return "zeros"
