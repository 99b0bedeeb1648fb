"""Codes into a named table of values, with one scale per group: NF4, FP4, MXFP4, fp8 storage, and superblocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from haversack.codecs.bitpack import UNIT_COLUMNS, packed_row_bytes
from haversack.codecs.codebooks import BITS, Codebook, codebook
from haversack.codecs.scale_codings import SUPERBLOCK_COLUMNS, SuperblockScales
from haversack.errors import CheckpointError
from haversack.kernels.format import MAX_TABLE, PackedFormat
from haversack.ledger import DTYPE_BYTES, total_bytes
from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import ScalarCodes
from haversack.parts.weights.decoded import DecodedGrid
from haversack.parts.weights.scale_search import BLOCK_ELEMENTS, group_importance, search_scales

if TYPE_CHECKING:
    import torch

    from haversack.kernels.ir_superscales import SuperscaleCase

_SMALLEST_SHRINK = {2: 0.45, 3: 0.55, 4: 0.65, 8: 0.85}
_NUM_SHRINKS = {2: 16, 3: 14, 4: 12, 8: 4}
"""Range of clipping that is searched, per bits, as shares of the scale that covers the group's extreme."""

SCALE_TILE_BYTES, _ROW_MULTIPLE = 4 << 20, 64
"""Second-level scales are written out for so many bytes' rows at once: what a matrix of 4,096 by 8,192 has in groups of 16."""

SECONDS_PER_SUPERSCALE = 1.3e-10
"""One thread's to write one second-level scale out, beside the product: 91 to 155 ps for groups of 16 and 32 in a matrix of 2,048 x 2,048
in cache (torch 2.13, AVX-512 of an EPYC, beside other work)."""


@dataclass(frozen=True)
class CodebookGrid(DecodedGrid):
    """Values of a named table times one scale per group: stores `bits` plus the scales' bits / `group_size` per weight.

    `values` names the table (`codecs/codebooks.py`). `group_size` is 16, 32, 64 or 128 columns, or 0 for one group
    per row. `scales` names how they are stored (`codecs/scale_codings.py`): MXFP4 is fp4 with e8m0 scales of 32
    columns; with s6 or u4, superblocks of 256 columns make groups of 16 or 32 cheap (0.44 and 0.19 bits). `search`
    chooses each group's clipping by the importance-weighted squared error; without it, scales cover the group's extreme.
    Scales are rounded as stored before codes are chosen.

    Error: half the distance of neighbouring values times the scale, without clipping. Source: Dettmers et al. 2023
    (arXiv 2305.14314, section 3) for block-wise tables; differs in searching the scale instead of dividing by the
    extreme, and in second-level scales that are integers, as llama.cpp's K-quants have them (Kawrakow 2023).
    """

    id: ClassVar[str] = "codebook"
    title: ClassVar[str] = "codes into a named table of values"
    source: ClassVar[Source | None] = Source(
        "Dettmers, Pagnoni, Holtzman, Zettlemoyer",
        2023,
        "QLoRA: Efficient Finetuning of Quantized LLMs",
        "2305.14314",
        "section 3",
    )

    values: str = "nf4"
    group_size: int = 64
    scales: str = "f16"
    search: bool = True

    def __post_init__(self) -> None:
        check_range(self.id, "values", self.values, f"one of {', '.join(BITS)}", self.values in BITS)
        self.check_groups()
        check_range(self.id, "search", self.search, "true or false", isinstance(self.search, bool))

    @property
    def bits(self) -> int:
        """Bits per code."""
        return BITS[self.values]

    @property
    def label(self) -> str:
        words = [self.values, f"g{self.group_size}" if self.group_size else "per row"]
        words += [self.scales] if self.scales != "f16" else []
        return " ".join(words + ([] if self.search else ["absmax"]))

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The scales' working state for `weight` `(out, in)`; `importance` is `(in,)`.

        Raises CheckpointError for values that are not finite, or beyond what the scales can hold.
        """
        import torch
        import torch.nn.functional as F

        in_features = weight.shape[1]
        groups, padded = self.num_groups(in_features), self.padded_features(in_features)
        self._check_range(weight)
        table = codebook(self.values)
        weighting = group_importance(importance, in_features, padded, groups)
        states = []
        for block in weight.split(max(1, BLOCK_ELEMENTS // padded)):
            block = F.pad(block.float(), (0, padded - in_features)).view(-1, groups, padded // groups)
            states.append(self._fit(block, weighting, table))
        return {name: torch.cat([state[name] for state in states]) for name in states[0]}

    def quantize(self, weight: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0) -> torch.Tensor:
        import torch

        scale = self._column_scales(scales, first_column, weight.shape[1])
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
        return codebook(self.values).nearest_codes(weight.float() * inverse)

    def dequantize(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0
    ) -> torch.Tensor:
        return codebook(self.values).values(codes).mul_(self._column_scales(scales, first_column, codes.shape[1]))

    def scalar_codes(self, scales: Mapping[str, torch.Tensor]) -> ScalarCodes | None:
        import torch

        book, scale = codebook(self.values), self.coding.values(scales)
        if len(book.ordered) > MAX_TABLE:
            return None
        values, zero = tuple(book.ordered.tolist()), torch.zeros_like(scale)
        return ScalarCodes(scale, zero, 2**self.bits, self.group_size or 2**31, values, book.codes)

    def matmul(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor:
        if not self._has_kernels:
            return super().matmul(x, tensors, out_features)
        from haversack.kernels.registry import packed_matmul

        in_features = x.shape[-1]
        step = self.scale_rows(in_features) if self._has_superscales else out_features
        if out_features <= step:
            return packed_matmul(
                x,
                tensors["codes"],
                self._plain_scales(tensors, slice(None), in_features),
                in_features=in_features,
                **self._form,
            )
        out = x.new_empty(*x.shape[:-1], out_features)
        for first in range(0, out_features, step):
            rows = slice(first, first + step)
            scales = self._plain_scales(tensors, rows, in_features)
            out[..., rows] = packed_matmul(x, tensors["codes"][rows], scales, in_features=in_features, **self._form)
        return out

    def rows(self, index: torch.Tensor, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        if not self._has_kernels:
            return super().rows(index, tensors, in_features)
        import torch

        from haversack.kernels.registry import packed_rows

        if not self._has_superscales:
            return packed_rows(index, tensors["codes"], tensors["scales"], in_features=in_features, **self._form)
        scales = self._plain_scales(tensors, index, in_features)
        return packed_rows(
            torch.arange(len(index)), tensors["codes"][index], scales, in_features=in_features, **self._form
        )

    def workspace_bytes(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> int:
        if not self._has_kernels:
            return super().workspace_bytes(num_tokens, out_features, in_features, dtype)
        from haversack.describe.checkpoint import torch_dtype
        from haversack.kernels.registry import workspace_bytes

        case = {"dtype": torch_dtype(dtype), "scales": self._kernel_scales, **self._form}
        if not self._has_superscales:
            return workspace_bytes(num_tokens, out_features, in_features, **case)
        rows = min(out_features, self.scale_rows(in_features))
        expanded = 2 * rows * self.num_groups(in_features)
        product = rows * num_tokens * DTYPE_BYTES[dtype] if rows < out_features else 0
        return workspace_bytes(num_tokens, rows, in_features, **case) + expanded + product

    def rows_bytes(self, num_rows: int, in_features: int) -> int:
        if not self._has_kernels:
            return super().rows_bytes(num_rows, in_features)
        from haversack.kernels.registry import rows_bytes

        made = rows_bytes(num_rows, in_features, scales=self._kernel_scales, **self._form)
        if not self._has_superscales:
            return made
        groups, row_bytes = self.num_groups(in_features), packed_row_bytes(self.padded_features(in_features), self.bits)
        taken = row_bytes + 2 * groups + total_bytes(self.coding.stored(1, groups)) + 8
        return made + num_rows * taken  # their codes, scales as stored and as written out, and row numbers

    def kernel_name(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> str:
        if not self._has_kernels:
            return super().kernel_name(num_tokens, out_features, in_features, dtype)
        from haversack.describe.checkpoint import torch_dtype
        from haversack.kernels.registry import kernel_name

        case = {"dtype": torch_dtype(dtype), "scales": self._kernel_scales, **self._form}
        name = kernel_name(num_tokens, out_features, in_features, **case)
        return f"{name} under superscales" if self._has_superscales else name

    def kernel_format(self, in_features: int) -> PackedFormat | None:
        if not self._has_kernels:
            return None
        table = tuple(codebook(self.values).table.tolist())
        return PackedFormat(self.bits, self.group_size, in_features, True, table, self._kernel_scales)

    def superscale_case(self, in_features: int) -> SuperscaleCase | None:
        from haversack.kernels.ir_superscales import SuperscaleCase

        coding = self.coding
        if not isinstance(coding, SuperblockScales) or not self._has_kernels:
            return None
        return SuperscaleCase(coding.bits, coding.num_groups, coding.signed, self.num_groups(in_features))

    def scale_rows(self, in_features: int) -> int:
        fit = SCALE_TILE_BYTES // (2 * self.num_groups(in_features)) // _ROW_MULTIPLE * _ROW_MULTIPLE
        return max(_ROW_MULTIPLE, fit)

    def decode_seconds(self, num_weights: int) -> float:
        if not self._has_kernels:
            return super().decode_seconds(num_weights)
        return num_weights / self.group_size * SECONDS_PER_SUPERSCALE if self._has_superscales else 0.0

    @property
    def _has_kernels(self) -> bool:
        """Whether the kernel registry reads this form: a table of 16 values at most, and scales of groups as they are or
        written out first."""
        if 1 << self.bits > MAX_TABLE:
            return False
        if not self._has_superscales:
            return True
        from haversack.kernels.superscales import supported

        return supported()

    @property
    def _has_superscales(self) -> bool:
        return isinstance(self.coding, SuperblockScales)

    @property
    def _kernel_scales(self) -> str:
        return "f16" if self._has_superscales else self.scales

    def _plain_scales(
        self, tensors: Mapping[str, torch.Tensor], rows: slice | torch.Tensor, in_features: int
    ) -> torch.Tensor:
        """Scales `(rows, groups)` of some rows, as kernels read them."""
        case = self.superscale_case(in_features)
        if case is None:
            return tensors["scales"][rows]
        from haversack.kernels.superscales import expand

        return expand(tensors["scales"][rows], tensors["superscales"][rows], case)

    @property
    def _form(self) -> dict[str, Any]:
        """The registry's words for this grid."""
        table = tuple(codebook(self.values).table.tolist())
        return {"bits": self.bits, "group_size": self.group_size, "table": table}

    def decode(self, tensors: Mapping[str, torch.Tensor], rows: slice | torch.Tensor, in_features: int) -> torch.Tensor:
        import torch

        from haversack.codecs.bitpack import unpack_codes

        padded, groups = self.padded_features(in_features), self.num_groups(in_features)
        codes = unpack_codes(tensors["codes"][rows], self.bits, padded).reshape(-1).int()
        table = codebook(self.values).table.to(codes.device)
        values = torch.index_select(table, 0, codes).view(-1, groups, padded // groups)
        values *= self.coding.unpack(tensors, rows, groups)[..., None]
        return values.view(-1, padded)[:, :in_features]

    def decode_row_bytes(self, in_features: int) -> int:
        """Packed row, codes as bytes and as int32, float32 values; and the scales on their way to float32."""
        padded, groups = self.padded_features(in_features), self.num_groups(in_features)
        columns = -(-padded // UNIT_COLUMNS) * UNIT_COLUMNS
        return packed_row_bytes(padded, self.bits) + 10 * columns + 16 * (groups + SUPERBLOCK_COLUMNS // 16)

    def _fit(self, weight: torch.Tensor, importance: torch.Tensor, table: Codebook) -> dict[str, torch.Tensor]:
        """The scales' working state for `weight` `(rows, groups, width)`."""
        import torch

        coding = self.coding
        cover = weight.abs().amax(-1) / table.largest
        if not self.search:
            return coding.encode(cover)
        offers = list(self._candidates(cover, table.symmetric))
        if len(table.ordered) > MAX_TABLE:
            return coding.encode(search_scales(weight, importance, table.nearest_values, offers))
        found, refit = _best_scales(weight, importance, offers, table)
        state = coding.encode(_best_scales(weight, importance, [found, refit], table)[0])
        states = [state, *coding.neighbours(state)]
        best = _best_offer(weight, importance, [coding.values(each) for each in states], table)[0]
        return state | {"scales": torch.stack([each["scales"] for each in states]).gather(0, best[None])[0]}

    def _candidates(self, cover: torch.Tensor, symmetric: bool) -> Iterator[torch.Tensor]:
        steps, smallest = _NUM_SHRINKS[self.bits], _SMALLEST_SHRINK[self.bits]
        for step in range(steps):
            scale = cover * (1.0 - (1.0 - smallest) * step / (steps - 1))
            yield scale
            if not symmetric and self.scales in ("f16", "s4", "s6"):
                yield -scale

    def _column_scales(self, scales: Mapping[str, torch.Tensor], first_column: int, num_columns: int) -> torch.Tensor:
        """float32 scales `(out, columns)` of some columns; `(out, 1)` where they share a group."""
        import torch

        if not self.group_size:
            return self.coding.values(scales)
        first, last = first_column // self.group_size, (first_column + num_columns - 1) // self.group_size
        if first == last:
            return self.coding.values(scales, slice(first, first + 1))
        groups = torch.arange(first_column, first_column + num_columns) // self.group_size
        return self.coding.values(scales)[:, groups]

    def _check_range(self, weight: torch.Tensor) -> None:
        largest = weight.abs().amax().item() if weight.numel() else 0.0
        limit = self.coding.largest * codebook(self.values).largest
        if not math.isfinite(largest):
            raise CheckpointError("a weight matrix holds values that are not finite; no codebook can represent them.")
        if largest > limit:
            raise CheckpointError(
                f"a weight of {largest:.4g} exceeds {limit:.4g}, the largest that {self.values} with {self.scales} "
                "scales can hold; keep this matrix in its own dtype."
            )


def _best_offer(
    weight: torch.Tensor, importance: torch.Tensor, offers: list[torch.Tensor], table: Codebook
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which of the scales `(rows, groups)` offered to each group is best, and the refit's sums under it."""
    import torch

    from haversack.kernels.scale_search import best_offers

    scales = torch.stack(offers)
    return best_offers(weight, importance, scales, scales, len(table.table), tuple(table.ordered.tolist()))


def _best_scales(
    weight: torch.Tensor, importance: torch.Tensor, offers: list[torch.Tensor], table: Codebook
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scales offered, and the least-squares scales under the values that they choose."""
    import torch

    best, products, squares = _best_offer(weight, importance, offers, table)
    return torch.stack(offers).gather(0, best[None])[0], products / squares.clamp_min(1e-30)
