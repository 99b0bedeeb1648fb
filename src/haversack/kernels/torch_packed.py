"""torch's own packed matmuls, in their own layouts: to be measured against, not chosen for packed models.

    torch-int8          `_weight_int8pack_mm`: signed bytes, row by row, with one bfloat16 scale per row: a plain layout
                        that could be mapped, but for no group smaller than a row.
    torch-int4-<isa>    `_weight_int4pack_mm_for_cpu`: an opaque layout that depends on the instruction set torch was
                        dispatched to. A file of it can't be read on another machine and would have to be repacked on
                        loading, which breaks mapping and the peak.

Both want bfloat16 activations: float32 ones take a path without vectors, some twenty times slower. Neither reads layout
`rows-v1` as it lies in the file, so the registry never chooses them; `benchmarks/kernels.py` runs them beside ours.
Values: int4 `(q - 8) * scale + zero`, int8 `q * scale`, with scales rounded to bfloat16 (2^-9).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from haversack.errors import UsageError


@dataclass(frozen=True)
class TorchPacked:
    """A matrix in one of torch's layouts: `layout` names it, `weight` and `scales` are what torch's operator takes."""

    layout: str
    weight: torch.Tensor
    scales: torch.Tensor
    group_size: int

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x W^T`, `(tokens, out)` bfloat16, for `x` `(tokens, in)` bfloat16."""
        if x.dtype != torch.bfloat16:
            raise UsageError(f"torch's packed matmuls are used with bfloat16 activations, got {x.dtype}")
        if self.group_size:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, self.group_size, self.scales)
        return torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scales)


def pack_torch_int8(codes: torch.Tensor, scales: torch.Tensor) -> TorchPacked:
    """Codes uint8 `(out, in)` around 128 and scales `(out, 1)`, as torch's int8 layout."""
    return TorchPacked("torch-int8", (codes ^ 128).view(torch.int8), scales.reshape(-1).bfloat16(), 0)


def pack_torch_int4(codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> TorchPacked:
    """Codes uint8 `(out, in)` of 0 to 15 around 8 and scales `(out, groups)`, as this machine's torch int4 layout."""
    if group_size not in (32, 64, 128, 256) or codes.shape[1] % group_size or codes.shape[0] % 16:
        raise UsageError(
            f"torch's int4 takes groups of 32, 64, 128 or 256 that divide the columns and multiples of 16 rows, "
            f"asked for {tuple(codes.shape)} in groups of {group_size}"
        )
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 2)
    both = torch.stack([scales.t(), torch.zeros_like(scales).t()], dim=-1).bfloat16().contiguous()
    isa = torch.backends.cpu.get_cpu_capability().lower()
    return TorchPacked(f"torch-int4-{isa}", weight, both, group_size)
