"""Which kernel computes from a packed matrix, for this shape, on this machine; and the contracts they all keep.

    packed_matmul   x (..., in) times a packed (out, in) matrix, transposed: (..., out)
    packed_rows     some rows of a packed matrix: an embedding lookup

A kernel declares what it supports and the workspace it allocates, and the first that supports a case computes it, in
the order fast to general. `kernel_name` tells which; nothing falls back without that name changing. The operators
themselves (`torch.ops.haversack.*`) are registered when first used, so that asking for names and bytes stays cheap.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING, Protocol

from haversack.errors import UsageError
from haversack.kernels.format import PackedFormat

if TYPE_CHECKING:
    import torch


class PackedKernel(Protocol):
    """An object, or a module, with these names is a kernel; `x` is `(tokens, in)` and contiguous."""

    @property
    def NAME(self) -> str: ...

    @property
    def activation_bits(self) -> int:
        """What its dot products take: 16 (floats) or 8 (int8)."""

    def supports(self, fmt: PackedFormat, num_tokens: int, dtype: torch.dtype, activation_bits: int) -> bool: ...

    def workspace_bytes(
        self, fmt: PackedFormat, num_tokens: int, out_features: int, dtype: torch.dtype, activation_bits: int
    ) -> int: ...

    def matmul(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        fmt: PackedFormat,
        activation_bits: int,
    ) -> torch.Tensor: ...


def packed_matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    activation_bits: int = 16,
    table: tuple[float, ...] | None = None,
) -> torch.Tensor:
    """`x W^T`, `(..., out)` in x's dtype, from packed codes uint8 `(out, row_bytes)` in layout `rows-v1`.

    `scales` is `(out, groups)`, float16, or uint8 exponents e of 2^(e - 127), where 0 stands for 0; `zeros` uint8
    `(out, groups)`, or None for a symmetric grid. With a `table` of 2^bits values (2 to 4 bits) a code stands for its
    value there. `group_size` 0 means one group per row. `activation_bits` 16 computes with the activations as they are (at most rounded to
    bfloat16 on long inputs); 8 quantizes them to int8 per group of columns, which is faster and has a damage of its
    own. Allocates at most `workspace_bytes` beyond its result.
    """
    import haversack.kernels.operators as operators

    return operators.packed_matmul(x, codes, scales, zeros, bits, group_size, in_features, activation_bits, table)


def packed_rows(
    index: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    table: tuple[float, ...] | None = None,
) -> torch.Tensor:
    """Rows `index` (integers, any shape) of the packed matrix: float32 `(*index.shape, in)`."""
    import haversack.kernels.operators as operators

    return operators.packed_rows(index, codes, scales, zeros, bits, group_size, in_features, table)


def kernel_name(
    num_tokens: int,
    out_features: int,
    in_features: int,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    activation_bits: int = 16,
    dtype: torch.dtype | None = None,
    table: tuple[float, ...] | None = None,
    scales: str = "f16",
) -> str:
    """Name of the kernel that computes this case here. `dtype` is that of the activations, float32 if not given."""
    import torch

    fmt = PackedFormat(bits, group_size, in_features, symmetric, table, scales)
    return choose_kernel(fmt, num_tokens, dtype or torch.float32, activation_bits).NAME


def workspace_bytes(
    num_tokens: int,
    out_features: int,
    in_features: int,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    activation_bits: int = 16,
    dtype: torch.dtype | None = None,
    table: tuple[float, ...] | None = None,
    scales: str = "f16",
) -> int:
    """The most bytes `packed_matmul` allocates beyond its result for `num_tokens` rows of input."""
    import torch

    dtype = dtype or torch.float32
    fmt = PackedFormat(bits, group_size, in_features, symmetric, table, scales)
    kernel = choose_kernel(fmt, num_tokens, dtype, activation_bits)
    return kernel.workspace_bytes(fmt, num_tokens, out_features, dtype, activation_bits)


def rows_bytes(
    num_rows: int,
    in_features: int,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    table: tuple[float, ...] | None = None,
    scales: str = "f16",
) -> int:
    """The most bytes `packed_rows` allocates for so many rows, its float32 result included."""
    from haversack.kernels import generic, ir_dequantize

    fmt = PackedFormat(bits, group_size, in_features, symmetric, table, scales)
    if ir_dequantize.supports(fmt):
        return 4 * num_rows * fmt.unit_columns
    return 4 * num_rows * in_features + generic.rows_workspace_bytes(fmt, num_rows)


@lru_cache(maxsize=4096)
def choose_kernel(
    fmt: PackedFormat, num_tokens: int, dtype: torch.dtype, activation_bits: int, device_type: str = "cpu"
) -> PackedKernel:
    """The first kernel, fast to general, that supports the case. Compiled kernels are for the CPU.

    For 8-bit activations a kernel with int8 dot products comes before those that round and multiply floats.
    """
    if activation_bits not in (8, 16):
        raise UsageError(f"activation_bits is 16 (as they are) or 8 (quantized per group), got {activation_bits}")
    able = [k for k in kernels(device_type) if k.supports(fmt, num_tokens, dtype, activation_bits)]
    for kernel in able:
        if kernel.activation_bits == activation_bits:
            return kernel
    for kernel in able:
        return kernel
    raise AssertionError("the generic kernel supports everything")


@cache
def kernels(device_type: str = "cpu") -> tuple[PackedKernel, ...]:
    """All kernels for a device of this machine, fast to general."""
    from haversack.kernels import compiled, generic
    from haversack.kernels.llvm import host_target

    if device_type != "cpu":
        return (generic,)
    target = host_target()
    return (*compiled.matvecs(target), compiled.CompiledTiles(target), generic)
