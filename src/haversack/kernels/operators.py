"""`torch.ops.haversack.packed_matmul` and `packed_rows`: the registry as torch operators, with fake implementations.

Fake implementations give shapes and dtypes alone, so that plans, `torch.compile` and fake tensors never touch a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch

from haversack.errors import UsageError
from haversack.kernels import compiled, generic, ir_dequantize
from haversack.kernels.format import PackedFormat
from haversack.kernels.registry import choose
from haversack.kernels.threads import at_most

_LIBRARY = torch.library.Library("haversack", "FRAGMENT")
_LIBRARY.define(
    "packed_matmul(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, int bits, int group_size, int in_features, "
    "int activation_bits=16, float[]? table=None) -> Tensor"
)
_LIBRARY.define(
    "packed_rows(Tensor index, Tensor codes, Tensor scales, Tensor? zeros, int bits, int group_size, int in_features, "
    "float[]? table=None) -> Tensor"
)

packed_matmul = torch.ops.haversack.packed_matmul
packed_rows = torch.ops.haversack.packed_rows


def _matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    activation_bits: int = 16,
    table: Sequence[float] | None = None,
) -> torch.Tensor:
    fmt = _format(bits, group_size, in_features, zeros is None, table and tuple(table), scales.dtype)
    _check(fmt, codes, scales, zeros)
    if x.shape[-1] != in_features or not x.is_floating_point():
        raise UsageError(f"the packed matrix has {in_features} columns; got input {x.dtype} {tuple(x.shape)}")
    num_tokens = prod(x.shape[:-1])
    out_shape = (*x.shape[:-1], codes.shape[0])
    if num_tokens == 0 or codes.shape[0] == 0:
        return x.new_zeros(out_shape)
    rows = x.reshape(num_tokens, in_features).contiguous()
    chosen = choose(fmt, num_tokens, codes.shape[0], x.dtype, activation_bits, codes.device.type)
    with at_most(chosen.threads):
        return chosen.kernel.matmul(rows, codes, scales, zeros, fmt, activation_bits).view(out_shape)


def _rows(
    index: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    table: Sequence[float] | None = None,
) -> torch.Tensor:
    fmt = _format(bits, group_size, in_features, zeros is None, table and tuple(table), scales.dtype)
    _check(fmt, codes, scales, zeros)
    if index.dtype not in (torch.int64, torch.int32):
        raise UsageError(f"row numbers are int64 or int32, got {index.dtype}")
    flat = index.reshape(-1)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < codes.shape[0]:
        raise UsageError(
            f"row numbers {int(flat.min())} to {int(flat.max())} asked of a packed matrix of {codes.shape[0]} rows"
        )
    if codes.device.type == "cpu" and ir_dequantize.supports(fmt) and flat.numel():
        values = codes.new_empty(flat.numel(), fmt.unit_columns, dtype=torch.float32)
        compiled.dequantize_rows(values, flat.to(torch.int64), codes, scales, zeros, fmt)
        values = values[:, :in_features]
    else:
        values = generic.rows(flat, codes, scales, zeros, fmt)
    return values.reshape(*index.shape, in_features)


@lru_cache(maxsize=4096)
def _format(
    bits: int,
    group_size: int,
    in_features: int,
    symmetric: bool,
    table: tuple[float, ...] | None,
    scale_dtype: torch.dtype,
) -> PackedFormat:
    stored = "e8m0" if scale_dtype == torch.uint8 else "f16"
    return PackedFormat(bits, group_size, in_features, symmetric, table, stored)


def _check(fmt: PackedFormat, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> None:
    """The tensors are what the format says: a wrong row length read by a kernel would be read beyond its end."""
    out_features = codes.shape[0]
    if codes.dtype != torch.uint8 or codes.shape != (out_features, fmt.row_bytes) or not codes.is_contiguous():
        raise UsageError(
            f"packed codes of {fmt.in_features} columns at {fmt.bits} bits are contiguous uint8 "
            f"(out, {fmt.row_bytes}), got {codes.dtype} {tuple(codes.shape)}"
        )
    per_group = (out_features, fmt.num_groups)
    if scales.dtype not in (torch.float16, torch.uint8) or scales.shape != per_group or not scales.is_contiguous():
        raise UsageError(
            f"scales are contiguous float16 (or uint8 exponents) {per_group}, got {scales.dtype} {tuple(scales.shape)}"
        )
    if zeros is not None and (zeros.dtype != torch.uint8 or zeros.shape != per_group or not zeros.is_contiguous()):
        raise UsageError(f"zeros are contiguous uint8 {per_group}, got {zeros.dtype} {tuple(zeros.shape)}")


def _fake_matmul(x, codes, scales, zeros, bits, group_size, in_features, activation_bits=16, table=None):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _fake_rows(index, codes, scales, zeros, bits, group_size, in_features, table=None):
    return codes.new_empty(*index.shape, in_features, dtype=torch.float32)


_LIBRARY.impl("packed_matmul", _matmul, "CompositeExplicitAutograd")
_LIBRARY.impl("packed_rows", _rows, "CompositeExplicitAutograd")
torch.library.register_fake("haversack::packed_matmul", _fake_matmul, lib=_LIBRARY)
torch.library.register_fake("haversack::packed_rows", _fake_rows, lib=_LIBRARY)
