"""Named sets of values for codes of 2, 3, 4 and 8 bits, and the nearest of them to a number.

    nf4          16 values at the quantiles of a normal distribution, with an exact zero (Dettmers et al. 2023, arXiv
                 2305.14314, appendix E); codes count from the lowest value up
    fp4          e2m1 of the OCP Microscaling specification (Rouhani et al. 2023, arXiv 2310.10537); codes are its
                 bits, sign first
    fp8          e4m3 without infinities (Micikevicius et al. 2022, arXiv 2209.05433, section 3); codes are its bits
    int2 to int4 integers around zero, -2^(bits-1) to 2^(bits-1) - 1, rising
    max2 to max4 4, 8 and 16 values of least squared error for a normal distribution of deviation 1 (Max 1960,
                 "Quantizing for minimum distortion", table 1), to bfloat16's precision, which kernels multiply; codes count
                 from the lowest value up
    max8         256 such values, float32: of normal weights 0.46 of the squared error of the best even steps

A second zero and not-a-numbers are never chosen; they decode to 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BITS = {
    "nf4": 4,
    "fp4": 4,
    "fp8": 8,
    "int2": 2,
    "int3": 3,
    "int4": 4,
    "max2": 2,
    "max3": 3,
    "max4": 4,
    "max8": 8,
}
"""Every codebook by name, with the bits of its codes."""

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022833252,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Codebook:
    """`table` `(2^bits,)` float32 gives the value of every code; `ordered` are the distinct values, rising, and
    `codes` `(len(ordered),)` uint8 theirs."""

    table: torch.Tensor
    ordered: torch.Tensor
    codes: torch.Tensor

    @cached_property
    def is_integer(self) -> bool:
        """Whether the values are consecutive integers."""
        return bool((self.ordered == self.ordered.round()).all() and (self.ordered.diff() == 1).all())

    @cached_property
    def symmetric(self) -> bool:
        """Whether the values are the same seen from either side, so that a scale's sign says nothing."""
        return bool((self.ordered == -self.ordered.flip(0)).all())

    @cached_property
    def largest(self) -> float:
        """The largest magnitude among the values."""
        return float(self.ordered.abs().max())

    def nearest_values(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest value to every number, float32; beyond the ends, the end."""
        if self.is_integer:
            return x.round().clamp_(float(self.ordered[0]), float(self.ordered[-1]))
        import torch

        return torch.index_select(self.ordered, 0, self._rank(x).view(-1)).view(x.shape)

    def nearest_codes(self, x: torch.Tensor) -> torch.Tensor:
        """The code, uint8, of the nearest value to every number."""
        return self.codes[self._rank(x)]

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The values, float32, of uint8 codes."""
        return self.table[codes.int()]

    def _rank(self, x: torch.Tensor) -> torch.Tensor:
        """Where the nearest value stands in `ordered`, int32: from a bin of equal width, which holds one border at most.
        Twenty times as fast as a binary search, whose branches are never foreseen."""
        import torch

        first, step, ranks = self._bins
        bins = ((x.reshape(-1) - first) * (1 / step)).clamp_(0, len(ranks) - 1).int()
        rank = torch.index_select(ranks, 0, bins)
        rank += x.reshape(-1) > torch.index_select(self._borders, 0, rank)
        return rank.view(x.shape)

    @cached_property
    def _borders(self) -> torch.Tensor:
        """Between neighbours; and an end that nothing reaches."""
        import torch

        return torch.cat([(self.ordered[1:] + self.ordered[:-1]) / 2, torch.tensor([math.inf])])

    @cached_property
    def _bins(self) -> tuple[float, float, torch.Tensor]:
        """First edge, width, and how many borders lie below each bin."""
        import torch

        borders = self._borders[:-1].double()
        step = float(borders.diff().min()) / 2 if len(borders) > 1 else 1.0
        first = float(borders[0]) - 2 * step
        edges = first + step * torch.arange(int((float(borders[-1]) - first) / step) + 3, dtype=torch.float64)
        return first, step, torch.searchsorted(borders, edges - step / 4).int()


@cache
def codebook(name: str) -> Codebook:
    """The codebook of a name in `BITS`."""
    import torch

    values = _table(name)
    by_value: dict[float, int] = {}
    for code, value in enumerate(values):
        if math.isfinite(value):
            by_value.setdefault(value, code)  # of two zeros, the positive one comes first
    ordered = sorted(by_value)
    table = torch.tensor([value if math.isfinite(value) else 0.0 for value in values])
    codes = torch.tensor([by_value[value] for value in ordered], dtype=torch.uint8)
    return Codebook(table, torch.tensor(ordered), codes)


def _table(name: str) -> tuple[float, ...]:
    if name == "nf4":
        return _NF4
    if name.startswith("int"):
        half = 1 << (BITS[name] - 1)
        return tuple(float(value) for value in range(-half, half))
    if name.startswith("max"):
        return _max_quantizer(1 << BITS[name])
    exponent_bits, mantissa_bits, bias = {"fp4": (2, 1, 1), "fp8": (4, 3, 7)}[name]
    positive = [_float_value(code, mantissa_bits, bias) for code in range(1 << (exponent_bits + mantissa_bits))]
    if name == "fp8":
        positive[-1] = math.nan
    return tuple(positive + [-value for value in positive])


def _float_value(code: int, mantissa_bits: int, bias: int) -> float:
    exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    if exponent == 0:
        return mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


def _max_quantizer(num_values: int) -> tuple[float, ...]:
    """Max's conditions, iterated: borders halve neighbouring values, values are the means between their borders."""
    half = num_values // 2
    if (
        num_values > 16
    ):  # so many settle slowly: begin where their density is the cube root of the normal one (Panter and Dite 1951)
        wide = NormalDist(0, math.sqrt(3))
        positive = [wide.inv_cdf((half + i + 0.5) / num_values) for i in range(half)]
    else:
        positive = [(2 * i + 1) * 3.0 / num_values for i in range(half)]
    for _ in range(2000 if num_values <= 16 else 200):
        borders = [0.0, *((a + b) / 2 for a, b in pairwise(positive)), math.inf]
        positive = [_normal_mean(low, high) for low, high in pairwise(borders)]
    if num_values <= 16:
        positive = [_bf16(value) for value in positive]
    return tuple([-value for value in reversed(positive)] + positive)


def _bf16(value: float) -> float:
    """The nearest number of 8 significant bits."""
    fraction, exponent = math.frexp(value)
    return math.ldexp(round(fraction * 256), exponent - 8)


def _normal_mean(low: float, high: float) -> float:
    """Mean of a standard normal variable between two borders."""

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def below(x: float) -> float:
        return (1 + math.erf(x / math.sqrt(2))) / 2

    return (density(low) - density(high)) / (below(high) - below(low))
