"""Sparse matrices, stored as such: a bit per weight says which are kept, and only those are stored, as they are or as codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.codecs.bitmap import pack_bits, unpack_bits
from haversack.codecs.codebooks import BITS
from haversack.errors import CheckpointError, UsageError
from haversack.ledger import StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.decoded import DecodedGrid

if TYPE_CHECKING:
    import torch

PLAIN = "f16"
"""Kept weights as 16-bit floats, and not as codes into a table."""

_F16_MAX = 65504.0


@dataclass(frozen=True)
class SparseGrid(DecodedGrid):
    """Keeps a `density` of the weights and stores those alone: 1 bit per weight of the matrix, and 16 or a code's bits per kept one.

    Of every row the same number is kept, so that bytes are known: `round(density * in)` of them (`per` 0), or `density * per` of each
    `per` neighbouring columns (2 of 4, say; the last columns padded). `values` is `f16`, or a table (`codecs/codebooks.py`) whose
    codes have one scale per `group_size` *kept* weights, stored as `scales` says. Which weights are kept is chosen by their
    magnitude; where columns have an importance and `weighted` is true, by magnitude times the root of it.

    Error: what is dropped, and for codes that of `CodebookGrid` on the rest. Source: Sun et al. 2023 (arXiv 2306.11695, section 3) for
    the choice by magnitude and input, within each row; differs in being stored really smaller, by rows' bit maps.
    """

    id: ClassVar[str] = "sparse"
    title: ClassVar[str] = "kept weights alone, and a bit map of where they are"
    source: ClassVar[Source | None] = Source(
        "Sun, Liu, Bair, Kolter", 2023, "A Simple and Effective Pruning Approach for Large Language Models", "2306.11695", "section 3"
    )  # fmt: skip

    density: float = 0.5
    per: int = 0
    values: str = PLAIN
    group_size: int = 32
    scales: str = "u4"
    weighted: bool = True

    def __post_init__(self) -> None:
        check_range(self.id, "density", self.density, "above 0 and below 1", 0 < self.density < 1)
        whole = isinstance(self.per, int) and not isinstance(self.per, bool) and 0 <= self.per <= 256 and self.per != 1
        check_range(self.id, "per", self.per, "0 (the whole row) or from 2 to 256", whole)
        kept = self.density * self.per
        check_range(
            self.id, "density", self.density, f"a whole number of {self.per} columns", abs(kept - round(kept)) < 1e-9
        )
        names = [PLAIN, *BITS]
        check_range(self.id, "values", self.values, f"one of {', '.join(names)}", self.values in names)
        check_range(self.id, "weighted", self.weighted, "true or false", isinstance(self.weighted, bool))
        self.check_groups()

    @property
    def bits(self) -> int:
        """Bits per kept weight."""
        return BITS.get(self.values, 16)

    @property
    def label(self) -> str:
        words = [f"{round(self.density * self.per)}:{self.per}" if self.per else f"sparse {self.density:g}"]
        words += [self.values if self.codes is None else self.codes.label]
        return " ".join(words + ([] if self.weighted else ["by magnitude"]))

    @property
    def codes(self) -> CodebookGrid | None:
        """The grid of the kept weights, standing side by side; None where they are stored as they are."""
        return None if self.values == PLAIN else CodebookGrid(self.values, self.group_size, self.scales)

    @property
    def float_scales(self) -> None:
        """Groups are of kept weights, and have no columns of their own."""
        return None

    def num_kept(self, in_features: int) -> int:
        """Weights kept of a row."""
        if not self.per:
            return max(1, round(self.density * in_features))
        return -(-in_features // self.per) * round(self.density * self.per)

    @property
    def padded_to(self) -> int:
        return self.per

    def padded_features(self, in_features: int) -> int:
        return -(-in_features // self.per) * self.per if self.per else in_features

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        kept = self.num_kept(in_features)
        places = StoredTensor("places", "U8", (out_features, -(-self.padded_features(in_features) // 8)))
        if self.codes is not None:
            return (places, *self.codes.stored(out_features, kept))
        return (places, StoredTensor("values", "F16", (out_features, kept)))

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The working state for `weight` `(out, in)`: `mask` `(out, padded)`, and what `held` says of the kept weights.

        Raises CheckpointError for values that are not finite, or beyond what float16 or the scales hold.
        """
        score = weight.float().abs()
        if self.weighted and importance is not None:
            score = score * importance.clamp_min(0).sqrt()
        return self.held(weight, self.chosen(score))

    def chosen(self, score: torch.Tensor) -> torch.Tensor:
        """Which weights to keep, bool `(out, padded)`: those of the highest scores `(out, in)`, as many as there is room for."""
        import torch
        import torch.nn.functional as F

        padding = self.padded_features(score.shape[1]) - score.shape[1]
        padded = F.pad(score, (0, padding), value=-1.0)
        grouped = padded.view(len(score), -1, self.per) if self.per else padded[:, None]
        number = round(self.density * self.per) if self.per else self.num_kept(score.shape[1])
        places = grouped.topk(number, -1).indices
        return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, places, True).flatten(1)

    def held(self, weight: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """The working state that keeps of `weight` `(out, in)` what `mask` `(out, padded)` says."""
        import torch

        kept = _side_by_side(weight.float(), mask)
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError("a weight matrix holds values that are not finite; none of them can be kept.")
        if self.codes is not None:
            return {"mask": mask, **self.codes.fit(kept)}
        if kept.numel() and float(kept.abs().max()) > _F16_MAX:
            raise CheckpointError(
                f"a weight of {float(kept.abs().max()):.4g} exceeds {_F16_MAX:.4g}, the largest of float16; keep this "
                "matrix in its own dtype."
            )
        return {"mask": mask, "values": kept.half()}

    def quantize(self, weight: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0) -> torch.Tensor:
        self._whole_rows(weight, scales, first_column)
        codes = scales["mask"].byte()
        if self.codes is not None:
            of_kept = self.codes.quantize(_side_by_side(weight.float(), scales["mask"]), scales)
            codes.masked_scatter_(scales["mask"], of_kept)
        return codes[:, : weight.shape[1]].contiguous()

    def dequantize(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0
    ) -> torch.Tensor:
        self._whole_rows(codes, scales, first_column)
        mask = scales["mask"]
        kept = (
            scales["values"].float()
            if self.codes is None
            else self.codes.dequantize(_side_by_side(codes, mask), scales)
        )
        return _spread(kept, mask)[:, : codes.shape[1]]

    def set_scale(self, scales: dict[str, torch.Tensor], group: int, scale: torch.Tensor) -> torch.Tensor:
        raise UsageError(f"{self.id}: groups of kept weights have no columns of their own; round with sparse-feedback.")

    def pack(self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mask = scales["mask"]
        places = {"places": pack_bits(mask)}
        if self.codes is None:
            return {**places, "values": scales["values"].contiguous()}
        state = {name: tensor for name, tensor in scales.items() if name != "mask"}
        return {**places, **self.codes.pack(_side_by_side(codes, mask), state)}

    def decode(self, tensors: Mapping[str, torch.Tensor], rows: slice | torch.Tensor, in_features: int) -> torch.Tensor:
        mask = unpack_bits(tensors["places"][rows], self.padded_features(in_features)).bool()
        if self.codes is None:
            kept = tensors["values"][rows].float()
        else:
            kept = self.codes.decode(tensors, rows, self.num_kept(in_features))
        return _spread(kept, mask)[:, :in_features]

    def decode_row_bytes(self, in_features: int) -> int:
        """The bit map as stored and as bytes, the kept values, and the row in float32."""
        padded, kept = self.padded_features(in_features), self.num_kept(in_features)
        held = 6 * kept if self.codes is None else self.codes.decode_row_bytes(kept) + 4 * kept
        return held + 8 * padded + 64

    def _whole_rows(self, columns: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int) -> None:
        if first_column or self.padded_features(columns.shape[1]) != scales["mask"].shape[1]:
            raise UsageError(f"{self.id}: what is kept is known of whole rows; round with sparse-feedback or nearest.")


def _side_by_side(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the mask `(out, padded)` keeps of `(out, in)`, `(out, kept)`."""
    import torch.nn.functional as F

    padded = F.pad(values, (0, mask.shape[1] - values.shape[1]))
    return padded[mask].view(len(values), -1)


def _spread(kept: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Kept values `(out, kept)` in their places `(out, padded)`, zeros elsewhere."""
    return kept.new_zeros(mask.shape).masked_scatter_(mask, kept)
