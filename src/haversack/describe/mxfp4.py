"""Tensors stored in MXFP4, seen as the 16-bit tensors that they stand for.

Blocks of 32 four-bit floats (E2M1) share one power of two (E8M0), by the OCP Microscaling Formats specification v1.0
(2023), sections 5.2 and 5.3. A checkpoint holds `NAME_blocks`, uint8 `(experts, rows, groups, 16)` with two codes per byte, the lower
half first, and `NAME_scales`, uint8 `(experts, rows, groups)`. What transformers calls `NAME` is the transposed
`(experts, 32 * groups, rows)`. Every value is one of 15 numbers times a power of two, which bfloat16 holds exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from haversack.describe.stored_form import Range, Read, StoredForm

if TYPE_CHECKING:
    import torch

METHOD = "mxfp4"
"""What configs call it in `quantization_config.quant_method`."""

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK_VALUES, BLOCK_BYTES = 32, 16
EXPONENT_BIAS = 127

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""E2M1 without its sign, which is the highest of the four bits (specification, table 5)."""


def paired_names(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """Names that blocks and scales of a checkpoint (name -> dtype, shape) stand for, with the shape of each."""
    found: dict[str, tuple[int, ...]] = {}
    for name, (dtype, shape) in shapes.items():
        if not name.endswith(BLOCKS) or dtype != "U8" or len(shape) != 4 or shape[3] != BLOCK_BYTES:
            continue
        base = name.removesuffix(BLOCKS)
        if shapes.get(base + SCALES) == ("U8", shape[:3]) and base not in shapes:
            found[base] = (shape[0], shape[2] * BLOCK_VALUES, shape[1])
    return found


@dataclass(frozen=True)
class Mxfp4Form(StoredForm):
    """One stack of experts' matrices."""

    def region(self, ranges: Sequence[Range], read: Read) -> torch.Tensor:
        experts, columns, rows = ranges
        blocks, scales = (
            read(part, [experts, rows, *((0, n, 1) for n in part.shape[2:])])
            for part in (self.parts[BLOCKS], self.parts[SCALES])
        )
        return dequantize(blocks, scales)[:, slice(*columns)]


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bfloat16 `(experts, 32 * groups, rows)` from uint8 blocks `(experts, rows, groups, 16)` and scales; exact.

    Holds one expert's values in float32 beside the result.
    """
    import torch

    table = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
    pairs = table[torch.arange(256)[:, None] >> torch.tensor([0, 4]) & 15]  # (256, 2): what a byte stands for
    num_experts, num_rows, num_groups, _ = blocks.shape
    out = torch.empty(num_experts, num_rows, num_groups, BLOCK_VALUES, dtype=torch.bfloat16)
    for expert in range(num_experts):
        exponents = (scales[expert].int() - EXPONENT_BIAS).unsqueeze(-1)
        out[expert] = torch.ldexp(pairs[blocks[expert].int()].flatten(-2), exponents)
    return out.flatten(-2).transpose(1, 2)
