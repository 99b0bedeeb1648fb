"""What each optimizer keeps from step to step, as declared tensors: the formula is the sum of their bytes."""

from __future__ import annotations

from math import prod

from haversack.engine.optimizers import EIGHT_BIT_BLOCK, EIGHT_BIT_MIN_ELEMENTS
from haversack.engine.training_trace import TrainedTensor
from haversack.ledger import StoredTensor

_STEP = StoredTensor("step", "F32", ())
"""torch counts steps in a float32 scalar for each tensor."""


def state_tensors(optimizer: str, tensor: TrainedTensor, dtype: str) -> tuple[StoredTensor, ...]:
    """The states of one trained tensor whose copy in the optimizer has `dtype` (its own, or F32 beside master weights).

    Of `n` weights of `w` bytes: AdamW `2 w n`, SGD with momentum `w n`, Muon `w n` for matrices inside the layers and
    AdamW's for the rest, 8-bit AdamW `2 n + 8 ceil(n / 256)` (`8 n` under 4,096 elements), Adafactor `w (rows + columns)`
    for matrices and `w n` for vectors; each tensor a step count of 4 bytes more, but for SGD, Muon and 8-bit AdamW.
    """
    shape = tensor.shape
    if optimizer == "muon" and tensor.is_matrix:
        return (StoredTensor("momentum_buffer", dtype, shape),)
    if optimizer in ("adamw", "muon"):
        return (StoredTensor("exp_avg", dtype, shape), StoredTensor("exp_avg_sq", dtype, shape), _STEP)
    if optimizer == "sgdm":
        return (StoredTensor("momentum_buffer", dtype, shape),)
    if optimizer == "adafactor":
        if len(shape) < 2:
            return (StoredTensor("variance", dtype, shape), _STEP)
        row, column = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
        return (StoredTensor("row_var", dtype, row), StoredTensor("col_var", dtype, column), _STEP)
    assert optimizer == "adamw8bit", optimizer
    n = prod(shape)
    if n < EIGHT_BIT_MIN_ELEMENTS:
        return (StoredTensor("exp_avg", "F32", (n,)), StoredTensor("exp_avg_sq", "F32", (n,)))
    blocks = -(-n // EIGHT_BIT_BLOCK)
    return (
        StoredTensor("exp_avg", "I8", (n,)),
        StoredTensor("exp_avg_scale", "F32", (blocks,)),
        StoredTensor("exp_avg_sq", "U8", (n,)),
        StoredTensor("exp_avg_sq_scale", "F32", (blocks,)),
    )
