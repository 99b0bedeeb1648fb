"""Sums of sign matrices: bit planes under one scale per group, or under one scale each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.codecs import bitplanes
from haversack.errors import CheckpointError
from haversack.kernels.format import MAX_TABLE, PLANE_GROUP_SIZES, PlaneFormat
from haversack.ledger import StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import Grid, ScalarCodes
from haversack.parts.weights.scale_search import BLOCK_ELEMENTS, group_importance, search_scales

if TYPE_CHECKING:
    import torch

_F16_MAX = 65504.0
_SMALLEST_SHRINK, _NUM_SHRINKS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.94), (16, 16, 14, 12, 10, 8, 6, 5)
"""Range of clipping that is searched, by the number of planes: fewer levels clip harder."""

MAX_BASES = 4
"""Planes with scales of their own: every sum of them is tried."""

_ALTERNATIONS = 4
"""Turns of nearest codes and least-squares scales: on normal weights eight more lower the squared error by 0.3% at most."""


@dataclass(frozen=True)
class SignPlanes(Grid):
    """Matrices of signs, added up: stores `bits + 16 / group_size` bits per weight, and with `bases` 16 / group_size for
    every plane. Rows are stored in blocks of 16, the last one padded.

    `bits` is the number of planes, 1 to 8 (1 to 4 with `bases`), `group_size` 32, 64 or 128 columns. One scale per group
    makes the values of a weight the odd numbers from `-(2^bits - 1)` to `2^bits - 1` times it; with `bases`, each plane has a
    scale of its own, so that the values may lie closer where weights are many. `activation_bits` 8 rounds the input per
    token and group and multiplies integers, exactly. Time grows with the number of planes (`kernels/ir_planes.py`).

    Error: half the distance of neighbouring values, without clipping; scales are rounded to float16 before codes are chosen.
    Source: Ma et al. 2024 (arXiv 2409.17870: bipolar integers); bases by alternation after Xu et al. 2018 (arXiv
    1802.00150); both differ in weighting errors by importance and in searching the clipping of the first.
    """

    id: ClassVar[str] = "sign-planes"
    title: ClassVar[str] = "bit planes of signs"
    source: ClassVar[Source | None] = Source(
        "Ma, Fang, Shao, Wang",
        2024,
        "Efficient Arbitrary Precision Acceleration for Large Language Models on GPU Tensor Cores",
        "2409.17870",
    )

    bits: int = 2
    group_size: int = 64
    bases: bool = False
    activation_bits: int = 16

    def __post_init__(self) -> None:
        check_range(self.id, "bases", self.bases, "true or false", isinstance(self.bases, bool))
        most = MAX_BASES if self.bases else bitplanes.MAX_PLANES
        whole = not isinstance(self.bits, bool) and self.bits in range(1, most + 1)
        check_range(self.id, "bits", self.bits, f"from 1 to {most}", whole)
        sizes = ", ".join(map(str, PLANE_GROUP_SIZES))
        check_range(self.id, "group_size", self.group_size, f"one of {sizes}", self.group_size in PLANE_GROUP_SIZES)
        check_range(self.id, "activation_bits", self.activation_bits, "8 or 16", self.activation_bits in (8, 16))

    @property
    def label(self) -> str:
        words = [f"signs{self.bits}", f"g{self.group_size}"] + (["bases"] if self.bases else [])
        return " ".join(words + ([] if self.activation_bits == 16 else [f"a{self.activation_bits}"]))

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        fmt, blocks = self.kernel_format(in_features), bitplanes.num_blocks(out_features)
        shape = (blocks, fmt.num_groups, fmt.scales_per_group, bitplanes.BLOCK_ROWS)
        return (StoredTensor("codes", "U8", (blocks, fmt.block_bytes)), StoredTensor("scales", "F16", shape))

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Scales `(out, groups, 1 or bits)` float16 of `weight` `(out, in)`; `importance` is `(in,)`.

        Raises CheckpointError for values that are not finite, or beyond what float16 scales can hold.
        """
        import torch
        import torch.nn.functional as F

        in_features = weight.shape[1]
        groups, padded = self.num_groups(in_features), self.padded_features(in_features)
        self._check_range(weight)
        weighting = group_importance(importance, in_features, padded, groups)
        found = []
        for block in weight.split(max(1, BLOCK_ELEMENTS // padded)):
            block = F.pad(block.float(), (0, padded - in_features)).view(-1, groups, self.group_size)
            found.append(self._fit_bases(block, weighting) if self.bases else self._fit_one(block, weighting))
        return {"scales": _to_f16(torch.cat(found))}

    def quantize(self, weight: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0) -> torch.Tensor:
        import torch

        scale = self._column_scales(scales, first_column, weight.shape[1])
        if self.bases:
            return _nearest_sums(weight.float(), scale.movedim(-1, 0))
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale)[..., 0]
        return self._nearest_odd(weight.float() * inverse).to(torch.uint8)

    def dequantize(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], first_column: int = 0
    ) -> torch.Tensor:
        return self._values(codes, self._column_scales(scales, first_column, codes.shape[1]))

    def scalar_codes(self, scales: Mapping[str, torch.Tensor]) -> ScalarCodes | None:
        import torch

        if self.bases or 1 << self.bits > MAX_TABLE:
            return None
        scale = scales["scales"][..., 0].float()
        return ScalarCodes(scale, torch.zeros_like(scale), 1 << self.bits, self.group_size, self._odd_numbers)

    def set_scale(self, scales: dict[str, torch.Tensor], group: int, scale: torch.Tensor) -> torch.Tensor:
        """Of bases, the highest plane's scale is set, and the others keep their proportion to it."""
        import torch

        of_group = scales["scales"][:, group].float()
        last = of_group[:, -1:]
        of_group = torch.where(last == 0, 0.0, of_group * (scale[:, None] / last))
        of_group[:, -1] = scale
        scales["scales"][:, group] = _to_f16(of_group)
        return scales["scales"][:, group, -1].float()

    def pack(self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch.nn.functional as F

        out_features, in_features = codes.shape
        codes = F.pad(codes, (0, self.padded_features(in_features) - in_features))
        stored = F.pad(scales["scales"], (0, 0, 0, 0, 0, -out_features % bitplanes.BLOCK_ROWS))
        stored = stored.unflatten(0, (-1, bitplanes.BLOCK_ROWS)).movedim(1, -1)
        return {"codes": bitplanes.pack_planes(codes, self.bits), "scales": stored.contiguous()}

    def matmul(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor:
        from haversack.kernels import decoded_tiles
        from haversack.kernels.registry import choose
        from haversack.kernels.threads import at_most

        in_features = x.shape[-1]
        fmt, values = self.kernel_format(in_features), x.reshape(-1, in_features)
        if x.device.type != "cpu" or not values.shape[0] or not out_features:
            row_bytes = self.decode_row_bytes(in_features)
            return decoded_tiles.matmul(x, lambda r: self._decode(tensors, r, in_features), out_features, row_bytes)
        chosen = choose(fmt, values.shape[0], out_features, x.dtype, self.activation_bits)
        given = (tensors["codes"], tensors["scales"], out_features, fmt, self.activation_bits)
        with at_most(chosen.threads):
            return chosen.kernel.matmul(values, *given).view(*x.shape[:-1], out_features)

    def rows(self, index: torch.Tensor, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        import torch

        from haversack.kernels.decoded_tiles import tile_rows

        out = torch.empty(len(index), in_features, device=index.device)
        step = tile_rows(self.decode_row_bytes(in_features))
        for first in range(0, len(index), step):
            out[first : first + step] = self._decode_rows(tensors, index[first : first + step], in_features)
        return out

    def workspace_bytes(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> int:
        from haversack.describe.checkpoint import torch_dtype
        from haversack.kernels.registry import choose_kernel

        fmt, computed = self.kernel_format(in_features), torch_dtype(dtype)
        kernel = choose_kernel(fmt, num_tokens, computed, self.activation_bits)
        return kernel.workspace_bytes(fmt, num_tokens, out_features, computed, self.activation_bits)

    def rows_bytes(self, num_rows: int, in_features: int) -> int:
        from haversack.kernels.decoded_tiles import tile_rows

        row_bytes = self.decode_row_bytes(in_features)
        return 4 * num_rows * in_features + min(num_rows, tile_rows(row_bytes)) * row_bytes

    def kernel_name(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> str:
        from haversack.describe.checkpoint import torch_dtype
        from haversack.kernels.registry import choose

        fmt = self.kernel_format(in_features)
        return choose(fmt, num_tokens, out_features, torch_dtype(dtype), self.activation_bits).name

    def decode_row_bytes(self, in_features: int) -> int:
        """A row's planes, its codes on their way to bytes, float32 values, signs and their product; its scales."""
        fmt = self.kernel_format(in_features)
        scales = 16 * fmt.num_groups * fmt.scales_per_group
        return fmt.block_bytes // bitplanes.BLOCK_ROWS + 18 * fmt.padded_columns + scales + 32

    def _decode(self, tensors: Mapping[str, torch.Tensor], rows: slice, in_features: int) -> torch.Tensor:
        import torch

        index = torch.arange(rows.start, rows.stop, device=tensors["codes"].device)
        return self._decode_rows(tensors, index, in_features)

    def _decode_rows(self, tensors: Mapping[str, torch.Tensor], index: torch.Tensor, in_features: int) -> torch.Tensor:
        """Some rows of the matrix, float32 `(len(index), in_features)`."""
        codes = bitplanes.unpack_rows(tensors["codes"], index, self.bits, self.padded_features(in_features))
        block, lane = index // bitplanes.BLOCK_ROWS, index % bitplanes.BLOCK_ROWS
        scale = tensors["scales"][block, :, :, lane].float()  # (rows, groups, scales)
        grouped = codes.view(len(index), -1, self.group_size)
        return self._values(grouped, scale[:, :, None]).view(len(index), -1)[:, :in_features]

    def _values(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """What codes stand for, under scales that have one more axis (of scales) and broadcast over the others."""
        if not self.bases:
            return codes.float().mul_(2).sub_((1 << self.bits) - 1).mul_(scale[..., 0])
        total = _signs(codes, 0).mul_(scale[..., 0])
        for plane in range(1, self.bits):
            total += _signs(codes, plane).mul_(scale[..., plane])
        return total

    def kernel_format(self, in_features: int) -> PlaneFormat:
        """The stored tensors in the kernels' words."""
        return PlaneFormat(self.bits, self.group_size, in_features, self.bases)

    @property
    def _odd_numbers(self) -> tuple[float, ...]:
        """The values at scale 1, rising."""
        return tuple(float(2 * q - (1 << self.bits) + 1) for q in range(1 << self.bits))

    def _nearest_odd(self, x: torch.Tensor) -> torch.Tensor:
        """The code, as a float, of the odd number nearest to every number."""
        highest = (1 << self.bits) - 1
        return x.add_(highest).mul_(0.5).round_().clamp_(0, highest)

    def _fit_one(self, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        """Scales `(rows, groups, 1)` of `weight` `(rows, groups, width)`: the best clipping, then least squares."""
        highest = (1 << self.bits) - 1
        cover = weight.abs().amax(-1) / highest
        smallest, steps = _SMALLEST_SHRINK[self.bits - 1], _NUM_SHRINKS[self.bits - 1]
        offers = [cover * (1 - (1 - smallest) * step / (steps - 1)) for step in range(steps)]

        def unit_values(x: torch.Tensor) -> torch.Tensor:
            return self._nearest_odd(x).mul_(2).sub_(highest)

        return search_scales(weight, importance, unit_values, offers)[..., None]

    def _fit_bases(self, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        """Scales `(rows, groups, bits)`: nearest codes and least-squares scales in turns, from the best single scale."""
        import torch

        scales = self._fit_one(weight, importance) * 2.0 ** torch.arange(self.bits)
        for _ in range(_ALTERNATIONS):
            codes = _nearest_sums(weight, scales.movedim(-1, 0)[..., None])
            signs = torch.stack([_signs(codes, plane) for plane in range(self.bits)], -1)  # (rows, groups, width, bits)
            weighted = signs * importance[..., None]
            curve, slope = weighted.mT @ signs, weighted.mT @ weight[..., None]
            curve.diagonal(dim1=-2, dim2=-1).add_(1e-6)  # planes that always agree share what they have
            scales = torch.linalg.solve(curve, slope)[..., 0]
        return scales

    def _column_scales(self, scales: Mapping[str, torch.Tensor], first_column: int, num_columns: int) -> torch.Tensor:
        """float32 scales `(out, columns, 1 or bits)` of some columns; `(out, 1, ...)` where they share a group."""
        import torch

        first, last = first_column // self.group_size, (first_column + num_columns - 1) // self.group_size
        if first == last:
            return scales["scales"][:, first : first + 1].float()
        groups = torch.arange(first_column, first_column + num_columns) // self.group_size
        return scales["scales"].float()[:, groups]

    def _check_range(self, weight: torch.Tensor) -> None:
        largest = weight.abs().amax().item() if weight.numel() else 0.0
        if not math.isfinite(largest):
            raise CheckpointError("a weight matrix holds values that are not finite; no signs can represent them.")
        if largest > _F16_MAX:
            raise CheckpointError(
                f"a weight of {largest:.4g} exceeds {_F16_MAX:.4g}, the largest scale that float16 can hold; keep this "
                "matrix in its own dtype."
            )


def _signs(codes: torch.Tensor, plane: int) -> torch.Tensor:
    """+1 or -1, float32, by one bit of every code."""
    return (codes >> plane & 1).float().mul_(2).sub_(1)


def _nearest_sums(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The code, uint8, of the sum of signed scales nearest to every weight; `scales` `(bits, ...)` broadcast over it."""
    import torch

    bits = len(scales)
    best = torch.full(weight.shape, math.inf)
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    for code in range(1 << bits):
        value = sum(scale if code >> plane & 1 else -scale for plane, scale in enumerate(scales))
        error = (weight - value).abs_()
        better = error < best
        codes.masked_fill_(better, code)
        best = torch.where(better, error, best)
    return codes


def _to_f16(scales: torch.Tensor) -> torch.Tensor:
    import torch

    return scales.clamp(-_F16_MAX, _F16_MAX).to(torch.float16)
