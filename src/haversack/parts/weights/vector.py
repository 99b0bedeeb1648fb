"""Vector codes: several neighbouring columns share one code, which names a vector of a codebook trained on the matrix itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.codecs.scale_codings import SUPERBLOCK_COLUMNS
from haversack.errors import UsageError
from haversack.ledger import StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.weights.decoded import DecodedGrid
from haversack.parts.weights.scale_search import root_mean_squares

if TYPE_CHECKING:
    import torch

NUM_VECTORS = 256
"""Of a codebook: a code is a byte."""

_TRAINED_ON, _TRAINING_TURNS = 32_768, 12
"""Vectors that a codebook is trained on at most, and turns of k-means: later ones change the error by less than 1%."""

_CHUNK_VECTORS = 8192
_TINY = 1e-30


@dataclass(frozen=True)
class VectorGrid(DecodedGrid):
    """One byte per `length` columns (2 or 4), the index of a vector; 256 vectors per matrix, in float16, and scales by group.

    Stores `8 / length` bits per weight, `4096 * length` bits per matrix, and the scales. Vectors are trained by k-means on
    the matrix over its groups' root mean squares, each number weighed by its column's second moment.

    Error: on normal weights at 2 bits 0.10 of their variance, where the best scalar codes leave 0.118. Source: Liu et al. 2024
    (arXiv 2409.17066, section 3.2: codebooks from weighted k-means); differs in vectors of 4 and 256 of them, so that a codebook is
    small beside a small matrix, in scales by group, and in no residual or outlier codebooks.
    """

    id: ClassVar[str] = "vector"
    title: ClassVar[str] = "vector codes with a codebook per matrix"
    source: ClassVar[Source | None] = Source(
        "Liu, Wen, Wang, Ye, Zhang, Cao, Li and Yang",
        2024,
        "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models",
        "2409.17066",
        "section 3",
    )

    length: int = 4
    group_size: int = 128
    scales: str = "f16"

    def __post_init__(self) -> None:
        check_range(self.id, "length", self.length, "2 or 4", self.length in (2, 4))
        self.check_groups()

    @property
    def bits(self) -> int:
        """Bits per weight of the codes."""
        return 8 // self.length

    @property
    def label(self) -> str:
        words = [f"vector{self.length}", f"g{self.group_size}" if self.group_size else "per row"]
        return " ".join(words + ([self.scales] if self.scales != "f16" else []))

    def padded_features(self, in_features: int) -> int:
        width = self.group_size or self.length
        return -(-in_features // width) * width

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        codes = StoredTensor("codes", "U8", (out_features, self.padded_features(in_features) // self.length))
        vectors = StoredTensor("vectors", "F16", (NUM_VECTORS, self.length))
        return (codes, vectors, *self.coding.stored(out_features, self.num_groups(in_features)))

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The scales' working state, and the codebook `vectors` `(256, length)` float16."""
        import torch

        scales = self.coding.encode(root_mean_squares(weight, self, importance))
        vectors = self._in_vectors(weight / self._column_scales(scales, 0, weight.shape[1]).clamp_min(_TINY))
        weights = torch.ones(1, weight.shape[1]) if importance is None else importance[None].clamp_min(0)
        weights = self._in_vectors(weights / weights.mean().clamp_min(_TINY)).expand_as(vectors)
        step = max(1, vectors.shape[0] * vectors.shape[1] // _TRAINED_ON)
        sample, weighing = (each.flatten(0, 1)[::step] for each in (vectors, weights))
        return {**scales, "vectors": _trained(sample, weighing.clamp_min(_TINY)).half()}

    def quantize(self, weight: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0) -> torch.Tensor:
        import torch

        if first_column % self.length:
            raise UsageError(f"{self.id}: a code is of {self.length} columns; begin with the first of them.")
        scale = self._column_scales(scales, first_column, weight.shape[1])
        vectors = self._in_vectors(weight / scale.clamp_min(_TINY))
        rows = vectors.flatten(0, 1)
        found = [
            _nearest(some, torch.ones_like(some), scales["vectors"].float()) for some in rows.split(_CHUNK_VECTORS)
        ]
        codes = torch.cat(found).view(vectors.shape[:2]).to(torch.uint8)
        return codes.repeat_interleave(self.length, 1)[:, : weight.shape[1]]

    def dequantize(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0
    ) -> torch.Tensor:
        import torch

        place = (torch.arange(codes.shape[1]) + first_column) % self.length
        values = scales["vectors"].float()[codes.int(), place]
        return values.mul_(self._column_scales(scales, first_column, codes.shape[1]))

    def pack(self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch.nn.functional as F

        of_vectors = codes[:, :: self.length]
        padding = self.padded_features(codes.shape[1]) // self.length - of_vectors.shape[1]
        packed = {"codes": F.pad(of_vectors, (0, padding)).contiguous(), "vectors": scales["vectors"].contiguous()}
        return {**packed, **self.coding.pack(scales)}

    def decode(self, tensors: Mapping[str, torch.Tensor], rows: slice | torch.Tensor, in_features: int) -> torch.Tensor:
        import torch

        codes, groups = tensors["codes"][rows].int(), self.num_groups(in_features)
        values = torch.index_select(tensors["vectors"].float(), 0, codes.view(-1)).view(len(codes), groups, -1)
        values *= self.coding.unpack(tensors, rows, groups)[..., None]
        return values.flatten(1)[:, :in_features]

    def decode_row_bytes(self, in_features: int) -> int:
        """Codes as bytes and int32, float32 values; the scales; and the codebook in float32, as if each row had one."""
        padded, groups = self.padded_features(in_features), self.num_groups(in_features)
        codebook_bytes = 4 * NUM_VECTORS * self.length
        return 5 * padded // self.length + 4 * padded + 16 * (groups + SUPERBLOCK_COLUMNS // 16) + codebook_bytes

    def _in_vectors(self, values: torch.Tensor) -> torch.Tensor:
        """`(rows, vectors, length)` of `(rows, columns)`, padded with zeros."""
        import torch.nn.functional as F

        return F.pad(values, (0, -values.shape[1] % self.length)).unflatten(1, (-1, self.length))

    def _column_scales(self, scales: Mapping[str, torch.Tensor], first_column: int, num_columns: int) -> torch.Tensor:
        """float32 scales `(rows, columns)`, or `(rows, 1)`."""
        import torch

        values = self.coding.values(scales)
        if not self.group_size:
            return values
        return values[:, (torch.arange(num_columns) + first_column) // self.group_size]


def _nearest(vectors: torch.Tensor, weights: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The index of the nearest vector of `table` `(256, length)`, by squared distances weighed by `weights`, like `vectors`
    `(n, length)`."""
    return (weights @ table.square().T).sub_(2 * (weights * vectors) @ table.T).argmin(1)


def _trained(vectors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """256 vectors of little weighed squared distance to `(n, length)`: k-means from a seeded sample; those without any
    vector of their own move beside those with the most error."""
    import torch

    generator = torch.Generator().manual_seed(0)
    table = vectors[torch.randint(len(vectors), (NUM_VECTORS,), generator=generator)].clone()
    for _ in range(_TRAINING_TURNS):
        nearest = torch.cat(
            [
                _nearest(v, w, table)
                for v, w in zip(*(each.split(_CHUNK_VECTORS) for each in (vectors, weights)), strict=True)
            ]
        )
        total = torch.zeros_like(table).index_add_(0, nearest, weights)
        table = torch.zeros_like(table).index_add_(0, nearest, weights * vectors) / total.clamp_min(_TINY)
        empty = (total.sum(1) == 0).nonzero()[:, 0]
        if len(empty):
            error = ((vectors - table[nearest]).square() * weights).sum(1)
            worst = error.topk(min(len(empty), len(error))).indices
            table[empty[: len(worst)]] = vectors[worst]
    return table
