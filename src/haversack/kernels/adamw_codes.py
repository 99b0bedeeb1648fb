"""AdamW's update of weights whose moments are codes of 8 or 4 bits, compiled: `torch.ops.haversack.adamw_codes_`, in place, without workspace."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from haversack.kernels.ir_adamw_codes import JOB, LANES, NUMBERS, adamw_codes_text
from haversack.kernels.llvm import CompiledModule, compile_text, host_target
from haversack.kernels.threads import parallel_address

MOST_BLOCK_SIZE = 256
"""A block's two moments are held in registers and on the stack."""

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
_LIBRARY = torch.library.Library("haversack", "FRAGMENT")
_LIBRARY.define(
    "adamw_codes_(Tensor(a!) weight, Tensor grad, Tensor(b!) mean, Tensor(c!) mean_scale, Tensor(d!) square, Tensor(e!) square_scale, "
    "Tensor decode_mean, Tensor encode_mean, Tensor decode_square, Tensor encode_square, float[] numbers, int block_size, int bits) -> ()"
)

adamw_codes_ = torch.ops.haversack.adamw_codes_
"""One step of whole blocks: all tensors flat, `weight` and `grad` float32, `mean` and `square` uint8, scales float32 one per block, tables as
`MomentCode` has them (decoding flat), `numbers` in the order of `NUMBERS`. Differs from doing it by torch's operations in the order of float operations alone."""


def takes(weight: torch.Tensor, grad: torch.Tensor, block_size: int) -> bool:
    """Whether these are what the kernel computes with: float32 on a CPU, contiguous, in blocks of whole vectors."""
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in (weight, grad))
    return plain and block_size % LANES == 0 and block_size <= MOST_BLOCK_SIZE


def _step(
    weight: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    mean_scale: torch.Tensor,
    square: torch.Tensor,
    square_scale: torch.Tensor,
    decode_mean: torch.Tensor,
    encode_mean: torch.Tensor,
    decode_square: torch.Tensor,
    encode_square: torch.Tensor,
    numbers: list[float],
    block_size: int,
    bits: int,
) -> None:
    blocks = len(weight) // block_size
    floats = (ctypes.c_float * len(NUMBERS))(*numbers)
    tensors = (
        weight, grad, mean, mean_scale, square, square_scale, decode_mean, encode_mean, decode_square, encode_square,
    )  # fmt: skip
    assert len(weight) == len(grad) == blocks * block_size and all(tensor.is_contiguous() for tensor in tensors)
    job = (ctypes.c_int64 * len(JOB))(*(t.data_ptr() for t in tensors), ctypes.addressof(floats), blocks)
    run = _FUNCTION(_module(block_size, bits).address("run"))
    run(ctypes.addressof(job), parallel_address(), torch.get_num_threads())


@cache
def _module(block_size: int, bits: int) -> CompiledModule:
    return compile_text(adamw_codes_text(block_size, bits), host_target())


_LIBRARY.impl("adamw_codes_", _step, "CPU")
_LIBRARY.impl("adamw_codes_", lambda *arguments: None, "Meta")
