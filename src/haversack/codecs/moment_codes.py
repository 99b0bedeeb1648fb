"""Codes of optimizer moments: numbers between -1 and 1 in 8 or 4 bits, fine near zero.

    8 bits          dynamic codes (Dettmers et al. 2021, arXiv 2110.02861, section 1.3): leading zeros count a decimal exponent, the bits
                    after the first one are a linear fraction of its decade; with sign or without
    4 bits, signed  the same with three exponents
    4 bits          k / 16 for k from 1 to 16 (Li et al. 2023, arXiv 2309.01507, section 4.1): no second moment is rounded to zero

Numbers are taken by their nearest bfloat16, whose bits index a table: no code's step is finer than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_EXPONENTS = {8: 7, 4: 3}


@dataclass(frozen=True, eq=False)
class MomentCode:
    """`decode_table` maps a byte to its values, `(256, 8 / bits)` float32, the low half first; `encode_table` `(2^16,)` uint8 a bfloat16's
    bits, from the lowest int16 up, to a code."""

    bits: int
    decode_table: torch.Tensor
    encode_table: torch.Tensor

    def decode(self, packed: torch.Tensor) -> torch.Tensor:
        """Values, float32, of packed codes: `8 / bits` for each byte."""
        return self.decode_table.index_select(0, packed.int()).view(-1)

    def encode(self, shares: torch.Tensor) -> torch.Tensor:
        """Packed codes of float32 numbers between -1 and 1; at 4 bits of an even number of them."""
        import torch

        codes = self.encode_table.index_select(0, shares.bfloat16().view(torch.int16).int().add_(2**15))
        return codes if self.bits == 8 else codes[0::2] + codes[1::2] * 16


def make_moment_code(bits: int, signed: bool) -> MomentCode:
    """The code of `bits` 8 or 4, for numbers with a sign or without; codes rise with their values. 65 KiB of tables."""
    import torch

    values = torch.tensor(sorted(moment_values(bits, signed)))
    borders = (values[1:] + values[:-1]) / 2
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float().nan_to_num(0.0)
    codes = torch.searchsorted(borders, every, out_int32=True).to(torch.uint8)
    if bits == 8:
        return MomentCode(bits, values[:, None], codes)
    byte = torch.arange(256)
    return MomentCode(bits, torch.stack([values[byte & 15], values[byte >> 4]], 1), codes)


def moment_values(bits: int, signed: bool) -> list[float]:
    """All values of a code."""
    if bits == 4 and not signed:
        return [k / 16 for k in range(1, 17)]
    exponents = _EXPONENTS[bits]
    positive = []
    for i in range(exponents):
        cells = 2 ** (i + (0 if signed else 1))
        positive += [10.0 ** (i - exponents + 1) * (0.1 + (k + 0.5) * 0.9 / cells) for k in range(cells)]
    return [0.0, 1.0, *positive, *([-x for x in positive] if signed else [])]
