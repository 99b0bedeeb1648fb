"""Entropy-coded bfloat16: exponents in Huffman codes, signs and mantissas as they are; nothing is lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.codecs.huffman import NUM_SYMBOLS, PADDING_BYTES
from haversack.errors import CheckpointError
from haversack.ledger import StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.weights.base import Code, WeightTask

if TYPE_CHECKING:
    import torch

TILE_BYTES, _ROW_MULTIPLE = 32 << 20, 64
"""A matrix is decoded in tiles of so many bytes: whole, if it is a layer's of a model of a few billions."""


@dataclass(frozen=True)
class EntropyCodedFloat(Code):
    """bfloat16 weights with their exponents in Huffman codes: stores `8 + exponent_bits` bits per weight, and 4 bytes per
    row.

    Exponents of trained weights have some 2.6 bits of entropy of their 8. How many a matrix takes depends on its values,
    so room for `exponent_bits` (1 to 8) per weight is set aside, in whole bytes per row; `encode` refuses a matrix that
    needs more, and `needed_bits` tells beforehand. Each product decodes the matrix again, tile by tile, into at most 32
    MiB, and multiplies as torch does.

    Error: none. A product is torch's own on rows of the matrix: to the bit where torch computes a row alike whatever rows
    are beside it. Source: Zhang et al. 2025 (arXiv 2504.11651, section 2); differs in a code of at most 12 bits looked up
    in one table, rows that begin at whole bytes in place of blocks with gaps, and room set aside, so that bytes are known
    before anything is coded.
    """

    id: ClassVar[str] = "entropy-coded"
    title: ClassVar[str] = "bfloat16 with Huffman-coded exponents"
    source: ClassVar[Source | None] = Source(
        "Zhang, Hariri, Zhong, Chaudhary, Sui, Hu, Shrivastava",
        2025,
        "70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via Dynamic-Length Float",
        "2504.11651",
        "section 2",
    )
    lossless: ClassVar[bool] = True
    dtype: ClassVar[str] = "BF16"

    exponent_bits: float = 3.0

    def __post_init__(self) -> None:
        ok = not isinstance(self.exponent_bits, bool) and 1 <= self.exponent_bits <= 8
        check_range(self.id, "exponent_bits", self.exponent_bits, "from 1 to 8", ok)

    @property
    def label(self) -> str:
        return f"bf16 huffman {self.exponent_bits:g}"

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        return (
            StoredTensor("exponents", "U8", (self._payload_bytes(out_features, in_features),)),
            StoredTensor("starts", "I32", (out_features,)),
            StoredTensor("rest", "U8", (out_features, in_features)),
            StoredTensor("lengths", "U8", (NUM_SYMBOLS,)),
        )

    def needed_bits(self, weight: torch.Tensor) -> float:
        """All codes, and a whole byte lost at the end of each row: no more is."""
        from haversack.codecs.huffman import code_lengths

        counts = _counts(_exponents(_narrow(weight)))
        return (float(counts @ code_lengths(counts).long()) + 7 * weight.shape[0]) / max(1, weight.numel())

    def holds(self, weight: torch.Tensor) -> bool:
        room = self._payload_bytes(*weight.shape) - PADDING_BYTES
        return self.needed_bits(weight) * weight.numel() / 8 <= min(room, 2**31 - PADDING_BYTES)

    def encode(self, task: WeightTask) -> dict[str, torch.Tensor]:
        import torch

        from haversack.codecs import huffman

        words = _narrow(task.weight).view(torch.int16)
        symbols = _exponents(words)
        lengths = huffman.code_lengths(_counts(symbols))
        sizes = huffman.row_bytes(symbols, lengths)
        starts = sizes.cumsum(0) - sizes
        payload = torch.zeros(self._payload_bytes(*words.shape), dtype=torch.uint8)
        needed = int(sizes.sum()) + PADDING_BYTES
        if needed > min(len(payload), 2**31):
            raise CheckpointError(
                f"exponents of this matrix take {8 * needed / words.numel():.2f} bits per weight, but room was set aside for "
                f"{self.exponent_bits:g} (and for 2 GiB at most); set more aside."
            )
        huffman.encode(symbols, lengths, starts, payload)
        rest = ((words >> 8 & 128) | (words & 127)).to(torch.uint8)
        return {"exponents": payload, "starts": starts.to(torch.int32), "rest": rest, "lengths": lengths}

    def matmul(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor:
        import torch
        import torch.nn.functional as F

        values = x.reshape(-1, x.shape[-1])
        step = self._tile_rows(x.shape[-1])
        if out_features <= step:
            every = torch.arange(out_features)
            return F.linear(values, self.rows(every, tensors, x.shape[-1]).to(x.dtype)).view(*x.shape[:-1], -1)
        out = values.new_empty(len(values), out_features)
        for first in range(0, out_features, step):
            index = torch.arange(first, min(first + step, out_features))
            # No name for the tile, or it would live while the next one is made.
            out[:, first : first + step] = F.linear(values, self.rows(index, tensors, x.shape[-1]).to(x.dtype))
        return out.view(*x.shape[:-1], out_features)

    def rows(self, index: torch.Tensor, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        import torch

        from haversack.kernels.bf16_decode import decode_rows

        out = torch.empty(len(index), in_features, dtype=torch.bfloat16)
        decode_rows(out, index.long(), tensors["exponents"], tensors["starts"], tensors["rest"], tensors["lengths"])
        return out

    def workspace_bytes(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> int:
        """The tile (a copy of it where the input isn't bfloat16), row numbers, the decoding table, and a tile's product."""
        from haversack.ledger import DTYPE_BYTES

        rows = min(out_features, self._tile_rows(in_features))
        copy_bytes = 0 if dtype == self.dtype else DTYPE_BYTES[dtype] * rows * in_features
        product = num_tokens * rows * DTYPE_BYTES[dtype] if rows < out_features else 0
        return rows * (2 * in_features + 8) + copy_bytes + product + _TABLE_BYTES

    def kernel_name(self, num_tokens: int, out_features: int, in_features: int, dtype: str) -> str:
        from haversack.kernels.bf16_decode import NAME

        return NAME

    def rows_bytes(self, num_rows: int, in_features: int) -> int:
        return num_rows * (2 * in_features + 8) + _TABLE_BYTES

    def decode_seconds(self, num_weights: int) -> float:
        from haversack.kernels.bf16_decode import SECONDS_PER_WEIGHT

        return num_weights * SECONDS_PER_WEIGHT

    def _payload_bytes(self, out_features: int, in_features: int) -> int:
        return out_features * math.ceil(in_features * self.exponent_bits / 8) + PADDING_BYTES

    def _tile_rows(self, in_features: int) -> int:
        return max(_ROW_MULTIPLE, TILE_BYTES // (2 * in_features) // _ROW_MULTIPLE * _ROW_MULTIPLE)


_TABLE_BYTES = 16 << 10
"""The decoding table, and the list that it is made from."""


def _narrow(weight: torch.Tensor) -> torch.Tensor:
    """The weights as bfloat16, contiguous. Raises CheckpointError for weights that aren't."""
    import torch

    narrow = weight.to(torch.bfloat16).contiguous()
    if weight.dtype != torch.bfloat16 and not torch.equal(narrow.to(weight.dtype), weight):
        raise CheckpointError("these weights are not bfloat16; only bfloat16 checkpoints are coded without loss.")
    return narrow


def _exponents(weight: torch.Tensor) -> torch.Tensor:
    """Bits 7 to 14 of bfloat16 (or of its bits as int16), uint8."""
    import torch

    return (weight.view(torch.int16) >> 7).to(torch.uint8)  # the sign lies above, and is cut off


def _counts(symbols: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.bincount(symbols.flatten(), minlength=NUM_SYMBOLS)
