"""Rows of bfloat16 decoded from Huffman-coded exponents, compiled: rows spread over the thread team."""

from __future__ import annotations

from functools import cache

import torch

from haversack.codecs.huffman import PADDING_BYTES, decoding_table
from haversack.kernels.ir_bf16_decode import JOB, TURN_ROWS, bf16_decode_text
from haversack.kernels.llvm import CompiledModule, compile_text, host_target
from haversack.kernels.threads import run_record, team_threads

NAME = "llvm-huffman-rows"

SECONDS_PER_WEIGHT = 1.3e-9
"""Of one thread of a Zen 5: the fastest of 300 runs over 262,144 weights, on a busy machine."""


def decode_rows(
    out: torch.Tensor,
    index: torch.Tensor,
    payload: torch.Tensor,
    starts: torch.Tensor,
    rest: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Write rows `index` int64 `(n,)` to `out` bfloat16 `(n, columns)`.

    `payload` uint8 with `starts` int32 `(rows,)` are codes of exponents in layout `huffman-v1`, `rest` uint8 `(rows,
    columns)` holds sign and mantissa, `lengths` uint8 `(256,)` the code's lengths. Allocates 8 KiB.
    """
    rows, columns = rest.shape
    assert out.shape == (len(index), columns) and out.is_contiguous() and out.dtype == torch.bfloat16
    assert starts.shape == (rows,) and payload.numel() >= PADDING_BYTES
    tensors = {
        "payload": payload,
        "starts": starts,
        "rest": rest,
        "table": decoding_table(lengths),
        "index": index,
        "out": out,
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    numbers = {"rows": len(index), "columns": columns}
    words = [tensors[n].data_ptr() if n in tensors else numbers[n] for n in JOB]
    run_record(_module(), words, team_threads(len(index) // TURN_ROWS))


@cache
def _module() -> CompiledModule:
    return compile_text(bf16_decode_text(), host_target())
