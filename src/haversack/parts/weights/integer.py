"""Integer codes per group of columns, with one 16-bit scale each: the grid that kernels are fastest on.

A weight is stored as a code `q` of `bits` bits. Symmetric: `w = (q - 2^(bits-1)) * scale`, where the scale may be
negative, so that the side with the larger extreme owns the one extra code. Asymmetric: `w = (q - zero) * scale`, with
a stored zero point among the codes. Bytes of a matrix `(out, in)` with `g = ceil(in / group_size)` groups: `out *
packed_row_bytes(g * group_size, bits)` for codes, `2 * out * g` for scales, `out * g` for zero points.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from haversack.errors import CheckpointError
from haversack.ledger import StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import Grid, ScalarCodes
from haversack.parts.weights.scale_search import group_importance

if TYPE_CHECKING:
    import torch

    from haversack.kernels.format import PackedFormat

_F16_MAX = 65504.0
_BLOCK_ELEMENTS = 2**19
"""Elements that the search handles at once: a copy of them and what is offered to their groups take at most 6 MiB,
however large the matrix is."""

_SMALLEST_SHRINK = {2: 0.30, 3: 0.45, 4: 0.55, 8: 0.92}
_NUM_SHRINKS = {2: 24, 3: 20, 4: 16, 8: 5}
"""Range of clipping that is searched, per bits: fewer levels clip harder."""


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Integers of 2, 3, 4 or 8 bits per group: stores `bits + 16 / group_size` bits per weight, and 8 / group_size
    more if asymmetric.

    `group_size` is 64 or 128 columns, or 0 for one group per row (8 bits only). Columns that do not fill the last
    group are padded with zeros, which are stored and counted. `activation_bits` 8 lets the kernel quantise the input
    per token and multiply integers. `search` chooses each group's clipping by the importance-weighted squared error
    of the rounded result; without it, scales cover minimum and maximum. Scales are rounded to float16 before codes
    are chosen.

    Error: at most half a scale per weight without clipping, plus 2^-11 of the group's extreme from the scale's own
    rounding. Source: clipping search after Nagel et al. 2021 (arXiv 2106.08295, section 2.3); differs in weighting by
    importance, in signed scales, and in one least-squares refit of the scale under the chosen codes.
    """

    id: ClassVar[str] = "integer"
    title: ClassVar[str] = "integers per group"
    source: ClassVar[Source | None] = Source(
        "Nagel, Fournarakis, Amjad, Bondarenko, van Baalen, Blankevoort",
        2021,
        "A White Paper on Neural Network Quantization",
        "2106.08295",
        "section 2",
    )

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    activation_bits: int = 16
    search: bool = True

    def __post_init__(self) -> None:
        check_range(self.id, "bits", self.bits, "2, 3, 4 or 8", self.bits in (2, 3, 4, 8))
        sizes = (0, 64, 128) if self.bits == 8 else (64, 128)
        check_range(
            self.id,
            "group_size",
            self.group_size,
            "64, 128, or 0 (the whole row) for 8 bits",
            not isinstance(self.group_size, bool) and self.group_size in sizes,
        )
        check_range(self.id, "activation_bits", self.activation_bits, "8 or 16", self.activation_bits in (8, 16))
        check_range(self.id, "symmetric", self.symmetric, "true or false", isinstance(self.symmetric, bool))
        check_range(self.id, "search", self.search, "true or false", isinstance(self.search, bool))

    @property
    def label(self) -> str:
        words = [f"int{self.bits}", f"g{self.group_size}" if self.group_size else "per row"]
        words += [] if self.symmetric else ["asym"]
        words += [] if self.activation_bits == 16 else [f"a{self.activation_bits}"]
        return " ".join(words + ([] if self.search else ["min-max"]))

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        from haversack.codecs.bitpack import packed_row_bytes

        groups = self.num_groups(in_features)
        row_bytes = packed_row_bytes(self.padded_features(in_features), self.bits)
        declared = [
            StoredTensor("codes", "U8", (out_features, row_bytes)),
            StoredTensor("scales", "F16", (out_features, groups)),
        ]
        if not self.symmetric:
            declared.append(StoredTensor("zeros", "U8", (out_features, groups)))
        return tuple(declared)

    @property
    def float_scales(self) -> str:
        return "scales"

    def scale_columns(self, in_features: int) -> int:
        return self.group_size or in_features

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Scales `(out, groups)` float16, and zero points uint8 if asymmetric, of `weight` `(out, in)`.

        `importance` `(in,)` weighs squared errors; a group whose importance is zero is weighed evenly. Workspace: 6
        MiB.
        """
        import torch

        out_features, in_features = weight.shape
        groups = self.num_groups(in_features)
        width = self.padded_features(in_features) // groups
        scales = torch.empty(out_features, groups, dtype=torch.float16)
        zeros = torch.empty(out_features, groups, dtype=torch.uint8)
        rows_per_block = max(1, _BLOCK_ELEMENTS // (groups * width))
        weighting = group_importance(importance, in_features, groups * width, groups)
        for start in range(0, out_features, rows_per_block):
            block = self._grouped(weight[start : start + rows_per_block])
            scale, zero = self._fit_groups(block, weighting)
            scales[start : start + rows_per_block] = scale.to(torch.float16)
            zeros[start : start + rows_per_block] = zero.to(torch.uint8)
        return {"scales": scales} if self.symmetric else {"scales": scales, "zeros": zeros}

    def quantize(self, weight: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0) -> torch.Tensor:
        import torch

        codes = torch.empty(weight.shape, dtype=torch.uint8)
        for columns, scale, zero in self._column_runs(weight.shape[1], scales, first_column):
            inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
            codes[:, columns] = (
                (weight[:, columns].float() * inverse).round_().add_(zero).clamp_(0, 2**self.bits - 1).to(torch.uint8)
            )
        return codes

    def dequantize(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0
    ) -> torch.Tensor:
        import torch

        values = torch.empty(codes.shape, dtype=torch.float32)
        for columns, scale, zero in self._column_runs(codes.shape[1], scales, first_column):
            values[:, columns] = (codes[:, columns].float() - zero) * scale
        return values

    def scalar_codes(self, scales: Mapping[str, torch.Tensor]) -> ScalarCodes:
        import torch

        scale = scales["scales"].float()
        zero = torch.full_like(scale, 2 ** (self.bits - 1)) if self.symmetric else scales["zeros"].float()
        return ScalarCodes(scale, zero, 2**self.bits, self.group_size or 2**31)

    def set_scale(self, scales: dict[str, torch.Tensor], group: int, scale: torch.Tensor) -> torch.Tensor:
        stored = _round_to_f16(scale)
        scales["scales"][:, group] = stored
        return stored

    def pack(self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        from haversack.codecs.bitpack import pack_codes

        padding = self.padded_features(codes.shape[1]) - codes.shape[1]
        if padding:  # padded columns meet zero inputs; the code of zero keeps their value zero as well
            if self.symmetric:
                fill = codes.new_full((codes.shape[0], padding), 2 ** (self.bits - 1))
            else:
                fill = scales["zeros"][:, -1:].expand(-1, padding)
            codes = torch.cat([codes, fill], dim=1)
        tensors = {"codes": pack_codes(codes.contiguous(), self.bits), "scales": scales["scales"].contiguous()}
        if not self.symmetric:
            tensors["zeros"] = scales["zeros"].contiguous()
        return tensors

    def matmul(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor:
        from haversack.kernels.registry import packed_matmul

        return packed_matmul(
            x,
            tensors["codes"],
            tensors["scales"],
            tensors.get("zeros"),
            bits=self.bits,
            group_size=self.group_size,
            in_features=x.shape[-1],
            activation_bits=self.activation_bits,
        )

    def rows(self, index: torch.Tensor, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        from haversack.kernels.registry import packed_rows

        return packed_rows(
            index,
            tensors["codes"],
            tensors["scales"],
            tensors.get("zeros"),
            bits=self.bits,
            group_size=self.group_size,
            in_features=in_features,
        )

    def workspace_bytes(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> int:
        from haversack.kernels.registry import workspace_bytes

        return workspace_bytes(num_tokens, out_features, in_features, **self._case(dtype))

    def rows_bytes(self, num_rows: int, in_features: int) -> int:
        from haversack.kernels.registry import rows_bytes

        return rows_bytes(num_rows, in_features, bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def kernel_name(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> str:
        from haversack.kernels.registry import kernel_name

        return kernel_name(num_tokens, out_features, in_features, **self._case(dtype))

    def kernel_format(self, in_features: int) -> PackedFormat:
        from haversack.kernels.format import PackedFormat

        return PackedFormat(self.bits, self.group_size, in_features, self.symmetric)

    def _case(self, dtype: str) -> dict[str, Any]:
        """The registry's words for this grid with activations of `dtype`."""
        from haversack.describe.checkpoint import torch_dtype

        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "activation_bits": self.activation_bits,
            "dtype": torch_dtype(dtype),
        }

    def _grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` as float32 `(rows, groups, width)`, padded with zeros; refuses what float16 scales can't hold."""
        import torch.nn.functional as F

        in_features = weight.shape[1]
        groups = self.num_groups(in_features)
        weight = F.pad(weight.float(), (0, self.padded_features(in_features) - in_features))
        largest = weight.abs().amax().item() if weight.numel() else 0.0
        limit = _F16_MAX * (2 ** (self.bits - 1) - 1)
        if not math.isfinite(largest):
            raise CheckpointError("a weight matrix holds values that are not finite; integers can't represent them.")
        if largest > limit:
            raise CheckpointError(
                f"a weight of {largest:.4g} exceeds {limit:.4g}, the largest that {self.bits}-bit codes with float16 "
                "scales can hold; keep this matrix in its own dtype."
            )
        return weight.view(weight.shape[0], groups, -1)

    def _fit_groups(self, weight: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Float16-rounded scales and zero points, both float32 `(rows, groups)`, of `(rows, groups, width)`."""
        import torch

        low, high = weight.amin(-1).clamp_max_(0), weight.amax(-1).clamp_min_(0)
        if not self.search:
            return self._cover(low, high, 1.0)
        steps, smallest = _NUM_SHRINKS[self.bits], _SMALLEST_SHRINK[self.bits]
        shrinks = [1.0 - (1.0 - smallest) * step / (steps - 1) for step in range(steps)]
        offers = [self._cover(low, high, shrink) for shrink in shrinks]
        if self.symmetric and self.bits <= 3:  # the extra code may serve the other side better
            offers += [(-scale, zero) for scale, zero in offers[::2]]
        chosen, products, squares = self._best(weight, importance, offers)
        refit = _round_to_f16(products / squares.clamp_min(1e-30))
        kept = [torch.stack(each).gather(0, chosen[None])[0] for each in zip(*offers, strict=True)]
        offers = [(kept[0], kept[1]), (refit, kept[1])]
        chosen, _, _ = self._best(weight, importance, offers)
        return torch.where(chosen == 1, refit, kept[0]), kept[1]

    def _best(
        self, weight: torch.Tensor, importance: torch.Tensor, offers: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        from haversack.kernels.scale_search import best_offers

        scales, zeros = (torch.stack(each) for each in zip(*offers, strict=True))
        return best_offers(weight, importance, scales, zeros, 2**self.bits)

    def _cover(self, low: torch.Tensor, high: torch.Tensor, shrink: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points that cover `shrink` times the range from `low` to `high`."""
        import torch

        levels = 2**self.bits
        if self.symmetric:
            half = levels // 2
            mostly_negative = -low >= high
            larger, smaller = torch.maximum(-low, high), torch.minimum(-low, high)
            scale = torch.maximum(larger / half, smaller / (half - 1)) * shrink
            scale = _round_to_f16(torch.where(mostly_negative, scale, -scale))
            return scale, torch.full_like(scale, half)
        scale = _round_to_f16((high - low) * (shrink / (levels - 1)))
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
        return scale, (-low * shrink * inverse).round_().clamp_(0, levels - 1)

    def _column_runs(
        self, num_columns: int, scales: Mapping[str, torch.Tensor], first_column: int
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | float]]:
        """Slices of the given columns that share a group, with scale and zero point `(out, 1)` float32."""
        width = self.group_size or first_column + num_columns
        start = 0
        while start < num_columns:
            group = (first_column + start) // width
            stop = min(num_columns, (group + 1) * width - first_column)
            scale = scales["scales"][:, group : group + 1].float()
            zero = 2.0 ** (self.bits - 1) if self.symmetric else scales["zeros"][:, group : group + 1].float()
            yield slice(start, stop), scale, zero
            start = stop


def _round_to_f16(scale: torch.Tensor) -> torch.Tensor:
    """What remains of float32 `scale` once it is stored as float16; clamped to what float16 holds."""
    import torch

    return scale.clamp(-_F16_MAX, _F16_MAX).to(torch.float16).float()
