"""Random Hadamard rotation of a matrix's inputs: outliers spread evenly, so that weights look normal to any grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.codecs.hadamard import block_columns, hadamard_transform
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import Grid, Transform, WeightTask

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class HadamardRotation(Transform):
    """Rotates inputs by `x -> H (s * x) / sqrt(n)` with random signs s: stores `in / 8` bytes.

    Blocks of columns are the largest power of two that divides `in_features`, so that any shape works and odd ones
    are not rotated (noted). The same rotation is applied to the activations at each product, in `n log n`. `seed`
    (0 to 2^31 - 1) draws the signs.

    Error: none but float rounding: the product is unchanged. Source: Ashkboos et al. 2024 (arXiv 2404.00456, section
    3); differs in rotating each matrix's input on its own instead of folding rotations into neighbours, which spares
    conditions on norms and residuals and costs the transform at run time.
    """

    id: ClassVar[str] = "hadamard"
    title: ClassVar[str] = "random Hadamard rotation of the inputs"
    source: ClassVar[Source | None] = Source(
        "Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman",
        2024,
        "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
        "2404.00456",
        "section 3",
    )
    lossless: ClassVar[bool] = True

    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self.id, "seed", self.seed, "from 0 to 2^31 - 1", 0 <= self.seed < 2**31)

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        return (StoredTensor("signs", "U8", (-(-in_features // 8),)),)

    def apply(self, task: WeightTask, grid: Grid) -> dict[str, torch.Tensor]:
        import torch

        in_features = task.weight.shape[1]
        if block_columns(in_features) == 1:
            task.notes.append(f"{in_features} columns are odd in number and were not rotated")
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(0, 256, (-(-in_features // 8),), generator=generator, dtype=torch.uint8)
        tensors = {"signs": signs}
        task.weight = self.transform_input(task.weight, tensors)
        if task.hessian is not None:
            half = self.transform_input(task.hessian, tensors)
            task.hessian = self.transform_input(half.T.contiguous(), tensors)
        return tensors

    def transform_input(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        signed = x * _signs(tensors["signs"], x.shape[-1]).to(x.dtype)
        return hadamard_transform(signed, block_columns(x.shape[-1])).to(x.dtype)

    def restore_rows(self, rows: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        rotated = hadamard_transform(rows, block_columns(rows.shape[-1]))
        return rotated * _signs(tensors["signs"], rows.shape[-1])

    def workspace_bytes(self, num_tokens: int, in_features: int, dtype: str) -> int:
        """The signed input and the transform's two float32 copies; and the signs."""
        return num_tokens * in_features * (DTYPE_BYTES[dtype] + 12) + 16 * in_features


def _signs(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """float32 `(in,)` of 1 and -1 from bits: bit i of byte j is the sign of column 8 j + i."""
    import torch

    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten()[:in_features].float().mul_(-2).add_(1)
