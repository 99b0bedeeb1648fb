"""Decode-time attention straight from stored keys and values, in compiled code; returns output and log-sum-exp.

For few queries that see every stored token (a step of decoding): nothing is expanded, each stored byte is read once per
eight rows of queries. Error against float64 over the stored values: 2^-18 of the largest |value| per output, from float32
sums and exp. Layouts: plain `(batch, kv_heads, tokens, head_dim)` in float32, bfloat16 or float16, and packed
`kv-tokens-v1` (`haversack.parts.kv.quantized`): per-channel keys, per-token values, 2, 4 or 8 bits.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from haversack.errors import UsageError
from haversack.kernels.ir_attention import ATTEND_ARGUMENTS, TENSORS, AttentionCase, attention_text, supports
from haversack.kernels.llvm import compile_text, host_target
from haversack.kernels.threads import parallel_address

MAX_ROWS = 8
"""Query rows of a KV head that are taken together; more go in rounds."""

_FLOATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_C_TYPES = {"ptr": ctypes.c_void_p, "i64": ctypes.c_int64, "i32": ctypes.c_int32}


def can_attend_plain(key_head_dim: int, value_head_dim: int, dtype: torch.dtype, device_type: str = "cpu") -> bool:
    """Whether `attend_plain` takes heads of these widths."""
    name = _FLOATS.get(dtype, "")
    return device_type == "cpu" and bool(name) and supports(key_head_dim, value_head_dim, name, name)


def can_attend_packed(
    key_head_dim: int, value_head_dim: int, key_bits: int, value_bits: int, device_type: str = "cpu"
) -> bool:
    """Whether `attend_packed` takes heads of these widths: a plane of a row is whole vectors of sixteen channels."""
    return device_type == "cpu" and supports(key_head_dim, value_head_dim, str(key_bits), str(value_bits))


def workspace_bytes(batch_size: int, num_heads: int, num_queries: int, key_head_dim: int) -> int:
    """What an attend allocates beyond its results: scaled queries in float32, and where there are many, their rounds."""
    return 3 * 4 * batch_size * num_heads * num_queries * key_head_dim


def attend_plain(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    num_tokens: int,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to tokens `0 ... num_tokens - 1` of slabs `(batch, kv_heads, slots, head_dim)`.

    `query` is `(batch, heads, queries, key_head_dim)`. Returns output `(batch, heads, queries, value_head_dim)` and
    log-sum-exp `(batch, heads, queries)`, float32, so that pieces combine.
    """
    form = _FLOATS[keys.dtype]
    return _attend(query, (keys, None, None, values, None, None), form, form, 64, num_tokens, scaling, softcap)


def attend_packed(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    key_scales: torch.Tensor,
    key_zeros: torch.Tensor,
    value_codes: torch.Tensor,
    value_scales: torch.Tensor,
    value_zeros: torch.Tensor,
    *,
    num_tokens: int,
    key_bits: int,
    value_bits: int,
    group_size: int,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the first `num_tokens` packed tokens, a whole number of groups; shapes as `QuantizedKV.stored` says.

    Returns output and log-sum-exp as `attend_plain` does.
    """
    if num_tokens % group_size:
        raise UsageError(f"packed tokens come in groups of {group_size}; asked to attend to {num_tokens}")
    tensors = (key_codes, key_scales, key_zeros, value_codes, value_scales, value_zeros)
    return _attend(query, tensors, str(key_bits), str(value_bits), group_size, num_tokens, scaling, softcap)


def _attend(
    query: torch.Tensor,
    tensors: tuple[torch.Tensor | None, ...],
    key: str,
    value: str,
    group_size: int,
    num_tokens: int,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch_size, num_heads, num_queries, key_head_dim = query.shape
    stored_keys, stored_values = tensors[0], tensors[3]
    assert stored_keys is not None and stored_values is not None
    num_kv_heads, slots = stored_keys.shape[1], stored_keys.shape[2]
    if not 1 <= num_tokens <= slots:
        raise UsageError(f"asked to attend to {num_tokens} tokens of a cache that stores {slots}")
    for name, tensor in zip(TENSORS, tensors, strict=True):
        if tensor is not None and not tensor.is_contiguous():
            raise UsageError(f"{name} must be a contiguous slab")
    value_head_dim = stored_values.shape[3] * (8 // int(value) if value.isdigit() else 1)
    rows = num_heads // num_kv_heads * num_queries
    scaled = query.to(torch.float32) * scaling
    scaled = scaled.reshape(batch_size * num_kv_heads, rows, key_head_dim)
    parts = []
    for first in range(0, rows, MAX_ROWS):
        part = scaled[:, first : first + MAX_ROWS].contiguous()
        case = AttentionCase(
            part.shape[1], key_head_dim, value_head_dim, key, value, group_size, softcap, host_target()
        )
        parts.append(_run(case, part, tensors, num_tokens))
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(p, dim=1) for p in zip(*parts))
    shape = (batch_size, num_heads, num_queries)
    return out.view(*shape, value_head_dim), lse.view(shape)


def _run(
    case: AttentionCase, query: torch.Tensor, tensors: tuple[torch.Tensor | None, ...], num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    items = query.shape[0]
    out = query.new_empty(items, case.rows, case.value_head_dim)
    lse = query.new_empty(items, case.rows)
    pointers = (ctypes.c_int64 * len(TENSORS))(*(0 if t is None else t.data_ptr() for t in tensors))
    strides = (ctypes.c_int64 * len(TENSORS))(*(0 if t is None else t.stride(1) * t.element_size() for t in tensors))
    _kernel(case)(
        query.data_ptr(),
        ctypes.addressof(pointers),
        ctypes.addressof(strides),
        out.data_ptr(),
        lse.data_ptr(),
        items,
        num_tokens,
        parallel_address(),
        min(torch.get_num_threads(), items),
    )
    return out, lse


@cache
def _kernel(case: AttentionCase) -> Any:
    module = compile_text(attention_text(case), case.target)
    function = ctypes.CFUNCTYPE(None, *(_C_TYPES[t] for t, _ in ATTEND_ARGUMENTS))(module.address("attend"))
    function.module = module  # type: ignore[attr-defined]  # the code lives as long as the function
    return function
