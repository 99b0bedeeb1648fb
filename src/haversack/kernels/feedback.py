"""Rounding with second-order feedback, compiled: one block of columns at a time, rows spread over the thread team."""

from __future__ import annotations

from functools import cache

import torch

from haversack.kernels.ir_feedback import JOB, TURN_ROWS, feedback_text
from haversack.kernels.llvm import CompiledModule, compile_text, host_target
from haversack.kernels.threads import run_record


def padded_rows(out_features: int) -> int:
    """Rows that `round_block` works on: whole turns."""
    return -(-out_features // TURN_ROWS) * TURN_ROWS


def round_block(
    target: torch.Tensor,
    weight: torch.Tensor,
    feedback: torch.Tensor,
    square: torch.Tensor,
    group: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    error: torch.Tensor,
    num_codes: int,
    table: tuple[float, ...] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 and changes float32, both `(columns, rows)`, of one block of columns; `error` `(rows,)` grows.

    `target` and `weight` are `(columns, rows)`, `feedback` `(columns, columns)`, `square` `(columns,)`, `scale` and
    `zero` `(groups, rows)`, `group` `(columns,)` int64: the formulas are `ir_feedback`'s, with a `table` of rising values
    those of tables, which read no `zero`. All float32 and contiguous,
    `rows` as `padded_rows` gives. Differs from doing it by torch's operations in the order of float sums alone.
    """
    columns, rows = target.shape
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    change = torch.empty(columns, rows)
    tensors = {
        "target": target,
        "weight": weight,
        "feedback": feedback,
        "square": square,
        "group": group,
        "scale": scale,
        "inverse": inverse,
        "zero": zero,
        "codes": codes,
        "change": change,
        "error": error,
    }
    assert rows % TURN_ROWS == 0 and all(tensor.is_contiguous() for tensor in tensors.values())
    words = [tensors[name].data_ptr() if name in tensors else 0 for name in JOB]
    words[JOB.index("columns")], words[JOB.index("rows")] = columns, rows
    run_record(_module(num_codes, table), words, torch.get_num_threads())
    return codes, change


@cache
def _module(num_codes: int, table: tuple[float, ...] | None) -> CompiledModule:
    return compile_text(feedback_text(num_codes, table), host_target())
