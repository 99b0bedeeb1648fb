"""Attention of one new token per sequence straight from a stored cache, in compiled code.

Nothing is expanded: each stored byte is read once per eight query rows of its head, by all threads, over heads and along
the context. Error against float64 over the stored values: 2^-18 of the largest |value| per output, from float32 sums and
exp, then one rounding to the result's dtype. The cache is described by its slabs and two counts per sequence, in the
words of `haversack.parts.kv.layer`: sinks, a ring, and packed groups (`kv-tokens-v1`) behind it.
"""

from __future__ import annotations

import copy
import ctypes
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from haversack.errors import UsageError
from haversack.kernels.ir_attention import JOB, attention_text
from haversack.kernels.ir_attention_case import MAX_ROWS, TENSORS, AttentionCase, supports
from haversack.kernels.llvm import CompiledModule, Target, compile_text, host_target
from haversack.kernels.registry import has_triton
from haversack.kernels.threads import team_entry

if TYPE_CHECKING:
    from haversack.kernels.triton_attention import TritonAttention

NAME = "llvm-attention"

UNITS_PER_THREAD = 2
"""Units of work that each thread should find, so that they end together: few heads are split along the context."""

NO_LIMIT = 1 << 40
"""`recent_tokens` where every token is seen."""

_WORDS = {name: i for i, name in enumerate(JOB)}


@dataclass(frozen=True)
class CacheForm:
    """What a kernel is made for: heads that share keys, head widths, dtype, and bits of the packed groups (0: none)."""

    num_heads: int
    num_kv_heads: int
    key_head_dim: int
    value_head_dim: int
    dtype: torch.dtype
    key_bits: int = 0
    value_bits: int = 0
    group_size: int = 64

    def is_supported(self, device_type: str = "cpu", target: Target | None = None) -> bool:
        """Whether there is a kernel for it: on a CPU for rows of whole vectors of sixteen channels, in every plane; on
        a GPU where triton is installed, for rows of whole bytes."""
        dims = (self.key_head_dim, self.value_head_dim)
        if device_type != "cpu":
            whole = all(d * bits % 8 == 0 for d, bits in zip(dims, (self.key_bits, self.value_bits), strict=True))
            known = _name(self.dtype) in ("float32", "bfloat16", "float16")
            both = (self.key_bits > 0) == (self.value_bits > 0)
            return device_type == "cuda" and has_triton() and whole and known and both
        packed = (self.key_bits, self.value_bits, self.group_size)
        return device_type == "cpu" and supports(*dims, _name(self.dtype), *packed, target or host_target())

    @property
    def rows(self) -> int:
        """Query rows of a KV head that are taken together: the most, up to `MAX_ROWS`, that divide them evenly."""
        groups = self.num_heads // self.num_kv_heads
        return max(n for n in range(1, MAX_ROWS + 1) if groups % n == 0)

    def case(self, softcap: float | None = None, target: Target | None = None) -> AttentionCase:
        return AttentionCase(
            self.rows,
            self.num_heads // self.num_kv_heads // self.rows,
            self.key_head_dim,
            self.value_head_dim,
            _name(self.dtype),
            self.key_bits,
            self.value_bits,
            self.group_size,
            softcap,
            target or host_target(),
        )

    def splits(self, batch_size: int, threads: int) -> int:
        """Parts of every head's context."""
        items = batch_size * self.num_heads // self.rows
        return -(-UNITS_PER_THREAD * threads // items) if threads > 1 else 1

    def workspace_bytes(self, batch_size: int, threads: int | None = None) -> int:
        """What one attend allocates beyond its output: its units' states, and the log-sum-exps."""
        threads = threads or torch.get_num_threads()
        states = batch_size * self.num_heads // self.rows * self.splits(batch_size, threads)
        return states * self.case().state_bytes + 4 * batch_size * self.num_heads


def decode_attention(
    form: CacheForm, tensors: Mapping[str, torch.Tensor], **settings: Any
) -> DecodeAttention | TritonAttention:
    """The kernel for slabs on their device; see `DecodeAttention` for `settings`."""
    if tensors["keys"].device.type == "cpu":
        return DecodeAttention(form, tensors, **settings)
    from haversack.kernels.triton_attention import TritonAttention

    return TritonAttention(form, tensors, **settings)


class DecodeAttention:
    """Attention to one layer's cache: `tensors` are its slabs by name, `num_groups` the packed groups they have room for.

    `counts` and `packed_until` (one per sequence) say what is stored; see `RingLayer`. The slabs stay where they are as
    long as this lives.
    """

    def __init__(
        self,
        form: CacheForm,
        tensors: Mapping[str, torch.Tensor],
        *,
        sink_tokens: int,
        ring_tokens: int,
        recent_tokens: int = NO_LIMIT,
        num_groups: int = 0,
        softcap: float | None = None,
        target: Target | None = None,
    ):
        for name, tensor in tensors.items():
            if not tensor.is_contiguous():
                raise UsageError(f"{name} must be a contiguous slab")
        self.form = form
        self.tensors = dict(tensors)  # kept alive
        self.case = form.case(softcap, target)
        self.module = _module(self.case)
        self._run = team_entry(self.module, "run", [("ptr", "job")])
        self.job = (ctypes.c_int64 * len(JOB))()
        self.set(
            num_kv_heads=form.num_kv_heads,
            num_slab_heads=form.num_kv_heads,
            sink_tokens=sink_tokens,
            ring_tokens=max(1, ring_tokens),  # a ring of no slots holds no token, but is divided by
            recent_tokens=recent_tokens,
            num_groups=max(1, num_groups),
            slots=tensors["keys"].shape[2],
            **self._slab_words(0),
        )

    def of_heads(self, first: int, count: int) -> DecodeAttention:
        """The same kernel and cache with a job of its own, for some KV heads: for a caller that sets every word but once."""
        other = copy.copy(self)
        other.form = replace(
            self.form, num_heads=self.form.num_heads // self.form.num_kv_heads * count, num_kv_heads=count
        )
        other.job = type(self.job)(*self.job)
        other.set(num_kv_heads=count, **self._slab_words(first))
        return other

    def _slab_words(self, first_head: int) -> dict[str, int]:
        """Where a head's part of every slab begins."""
        names = [name for name in ("keys", "values", *TENSORS) if name in self.tensors]
        return {name: self.tensors[name][:, first_head:].data_ptr() for name in names}

    def set(self, **words: int) -> None:
        """Fields of the job (see `ir_attention.JOB`)."""
        for name, value in words.items():
            self.job[_WORDS[name]] = value

    def __call__(
        self,
        query: torch.Tensor,
        new_keys: torch.Tensor | None,
        new_values: torch.Tensor | None,
        counts: Sequence[int],
        packed_until: Sequence[int],
        *,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output `(batch, heads, 1, value_head_dim)` in the query's dtype and log-sum-exp `(batch, heads, 1)`, float32.

        `query` is `(batch, heads, 1, key_head_dim)`, new tokens `(batch, kv_heads, 1, head_dim)`.
        """
        batch_size, form = query.shape[0], self.form
        query = _by_head(query)
        out = query.new_empty(batch_size, 1, form.num_heads, form.value_head_dim)
        lse = torch.empty(batch_size, form.num_heads, 1)
        threads = torch.get_num_threads()
        splits = form.splits(batch_size, threads)
        units = batch_size * form.num_heads // form.rows * splits
        partials = torch.empty(units * self.case.state_bytes, dtype=torch.uint8)
        rows = (ctypes.c_int64 * (2 * batch_size))(*counts, *packed_until)
        size = query.element_size()
        words = {
            "query": query.data_ptr(),
            "query_stride": query.stride(0) * size,
            "out": out.data_ptr(),
            "out_stride": out.stride(0) * size,
            "lse": lse.data_ptr(),
            "logits": 0,
            "scaling": struct.unpack("<I", struct.pack("<f", scaling))[0],
            "num_rows": batch_size,
            "splits": splits,
            "partials": partials.data_ptr(),
            "counts": ctypes.addressof(rows),
            "packed_until": ctypes.addressof(rows) + 8 * batch_size,
            "new_keys": 0,
            "new_values": 0,
        }
        if sinks is not None:
            sinks = sinks.detach().to(torch.float32).contiguous()
            words["logits"] = sinks.data_ptr()
        if new_keys is not None and new_values is not None:
            for name, new in (("key", new_keys), ("value", new_values)):
                if new.stride(3) != 1:
                    raise UsageError(f"a new {name} must have its channels side by side")
                words[f"new_{name}s"] = new.data_ptr()
                words[f"new_{name}_stride"] = new.stride(0) * size
                words[f"new_{name}_head_stride"] = new.stride(1) * size
        self.set(**words)
        self._run(ctypes.addressof(self.job), threads)
        return out.transpose(1, 2), lse


def _by_head(query: torch.Tensor) -> torch.Tensor:
    """The query itself where a sequence's heads lie side by side, else a copy in which they do."""
    query = query.detach()
    _, _, _, width = query.shape
    return query if query.stride(3) == 1 and query.stride(1) == width else query.contiguous()


@cache
def _module(case: AttentionCase) -> CompiledModule:
    return compile_text(attention_text(case), case.target)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
