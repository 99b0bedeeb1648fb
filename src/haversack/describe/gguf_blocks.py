"""GGUF's blocks of low-bit values, seen as the numbers that they stand for: `(blocks, bytes)` to `(blocks, values)`, float32.

The simple types hold 32 values under one float16 d (and a minimum m); the K types 256 values in groups of 16 or 32 whose scales
(and minima) are small integers under a float16 each. Source: github.com/ggml-org/ggml, ggml-common.h, which is the
definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from haversack.describe.gguf_file import NUMBERS, TYPES
from haversack.describe.stored_form import Range, Read, StoredCodes, StoredForm, StoredGrid

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GgufForm(StoredForm):
    """One tensor of a GGUF file. Its one part is bytes `(rows, bytes of a row)`.

    With `head_rows`, rows lie in pairs within heads of so many, as llama.cpp rotates them, and are seen in halves, as
    transformers does: row `t * head_rows / 2 + i` of a head is stored as its row `2 i + t`.
    """

    kind: str
    head_rows: int = 0

    def region(self, ranges: Sequence[Range], read: Read) -> torch.Tensor:
        rows, *columns = ranges
        values = dequantize(self._rows(rows, read), self.kind)
        return values[:, slice(*columns[0])] if columns else values.flatten()

    def codes(self, rows: Range, read: Read) -> StoredCodes | None:
        import torch

        if self.kind != "Q4_0":
            return None
        packed = self._rows(rows, read)
        block = TYPES[NUMBERS[self.kind]]
        blocks = packed.reshape(-1, block.num_bytes)
        scales = _half(blocks, 0).view(len(packed), -1)
        codes = _nibbles(blocks[:, 2:]).reshape(len(packed), -1)
        return StoredCodes(4, codes, scales, torch.full(scales.shape, 8, dtype=torch.int32))

    def grid(self, rows: Range, read: Read) -> StoredGrid | None:
        return StoredGrid(4, 32, True) if self.kind == "Q4_0" else None

    def _rows(self, rows: Range, read: Read) -> torch.Tensor:
        """Some rows' bytes, in the order in which they are seen."""
        (part,), (start, stop, step) = self.parts.values(), rows
        if not self.head_rows:
            return read(part, [(start, stop, 1), (0, part.shape[1], 1)])[::step]
        first, last = start // self.head_rows * self.head_rows, -(-stop // self.head_rows) * self.head_rows
        paired = read(part, [(first, last, 1), (0, part.shape[1], 1)])
        halves = paired.unflatten(0, (-1, self.head_rows // 2, 2)).transpose(1, 2).flatten(0, 2)
        return halves[start - first : stop - first : step]


def dequantize(rows: torch.Tensor, kind: str) -> torch.Tensor:
    """float32 `(rows, values)` of uint8 `(rows, bytes)` in a type of `gguf_file.TYPES`."""
    import torch

    block = TYPES[NUMBERS[kind]]
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(kind)
    if plain is not None:
        return rows.contiguous().view(plain).float()
    blocks = rows.reshape(-1, block.num_bytes)
    return _DECODERS[kind](blocks).reshape(len(rows), -1)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """float16 at a byte, as float32 `(blocks, 1)`."""
    import torch

    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """`(blocks, n)` bytes as `(blocks, 2 n)` codes: all low halves, then all high ones."""
    import torch

    return torch.cat([packed & 15, packed >> 4], 1)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """Four bytes as 32 codes of 0 or 16."""
    import torch

    return ((packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1) << 4


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    return _nibbles(b[:, 2:]).float().sub_(8).mul_(_half(b, 0))


def _q4_1(b: torch.Tensor) -> torch.Tensor:
    return _nibbles(b[:, 4:]).float().mul_(_half(b, 0)).add_(_half(b, 2))


def _q5_0(b: torch.Tensor) -> torch.Tensor:
    return (_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).float().sub_(16).mul_(_half(b, 0))


def _q5_1(b: torch.Tensor) -> torch.Tensor:
    return (_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])).float().mul_(_half(b, 0)).add_(_half(b, 2))


def _q8_0(b: torch.Tensor) -> torch.Tensor:
    import torch

    return b[:, 2:].contiguous().view(torch.int8).float().mul_(_half(b, 0))


def _two_bits(packed: torch.Tensor) -> torch.Tensor:
    """64 bytes as 256 codes: of each half, four planes of 32."""
    import torch

    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1)
    return ((packed.view(-1, 2, 1, 32) >> shifts) & 3).flatten(1)


def _q2_k(b: torch.Tensor) -> torch.Tensor:
    scales, codes = b[:, :16], _two_bits(b[:, 16:80].contiguous()).view(-1, 16, 16)
    scale, least = (scales & 15).float() * _half(b, 80), (scales >> 4).float() * _half(b, 82)
    return (codes.float() * scale.unsqueeze(-1) - least.unsqueeze(-1)).flatten(1)


def _q3_k(b: torch.Tensor) -> torch.Tensor:
    import torch

    high = (b[:, None, :32] >> torch.arange(8, dtype=torch.uint8).view(8, 1)) & 1  # (blocks, 8, 32)
    codes = (_two_bits(b[:, 32:96].contiguous()).view(-1, 8, 32) | high << 2).view(-1, 16, 16)
    low, top = _nibbles(b[:, 96:104]), b[:, 104:108]
    tops = (top.unsqueeze(1) >> torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1)) & 3  # (blocks, 4, 4)
    scale = (low | tops.flatten(1) << 4).float().sub_(32) * _half(b, 108)
    return (codes.float().sub_(4) * scale.unsqueeze(-1)).flatten(1)


def _six_bit_pairs(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """12 bytes as 8 scales and 8 minima of 6 bits."""
    import torch

    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, third & 15 | (first >> 6) << 4], 1)
    minima = torch.cat([second & 63, third >> 4 | (second >> 6) << 4], 1)
    return scales.float(), minima.float()


def _halves(packed: torch.Tensor) -> torch.Tensor:
    """128 bytes as codes `(blocks, 8, 32)`: of each 32 bytes the low halves, then the high ones."""
    import torch

    quarters = packed.reshape(-1, 4, 32)
    return torch.stack([quarters & 15, quarters >> 4], 2).view(-1, 8, 32)


def _under_pairs(codes: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    scales, minima = _six_bit_pairs(b[:, 4:16])
    scale, least = scales * _half(b, 0), minima * _half(b, 2)
    return (codes.float() * scale.unsqueeze(-1) - least.unsqueeze(-1)).flatten(1)


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    return _under_pairs(_halves(b[:, 16:]), b)


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    import torch

    high = ((b[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8).view(8, 1)) & 1) << 4
    return _under_pairs(_halves(b[:, 48:]) | high, b)


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    import torch

    low, high = b[:, :128].reshape(-1, 2, 64), _two_bits(b[:, 128:192].contiguous()).view(-1, 2, 128)
    codes = torch.cat([low & 15, low >> 4], 2) | high << 4
    scale = b[:, 192:208].contiguous().view(torch.int8).float() * _half(b, 208)
    return (codes.reshape(-1, 16, 16).float().sub_(32) * scale.unsqueeze(-1)).flatten(1)


_DECODERS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
