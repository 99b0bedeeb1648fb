"""The fast Walsh-Hadamard transform along the last axis, in blocks of a power of two.

`H_n` of Sylvester is symmetric, and over sqrt(n) orthogonal, so that the transform is its own inverse. It is done as a
product with a small matrix per factor of n (32 at most): n log n work, in few calls. Error: that of float32 sums.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

_LARGEST_FACTOR = 32


def block_columns(num_columns: int) -> int:
    """The largest power of two that divides a number of columns: the transform's block."""
    return num_columns & -num_columns


def hadamard_transform(x: torch.Tensor, block: int) -> torch.Tensor:
    """float32 `(..., columns)`: every block of `block` columns times `H / sqrt(block)`. Allocates twice its result."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    shape, y = x.shape, x.float()
    done = 1
    while done < block:
        factor = min(_LARGEST_FACTOR, block // done)
        if isinstance(y, FakeTensor):  # a trace runs through here, whose products take no real matrix
            matrix = y.new_empty((factor, factor))
        else:
            matrix = torch.from_numpy(_matrix(factor)).to(y.device)
        y = matrix @ y.reshape(-1, factor, done)  # mixes columns that are `done` apart
        done *= factor
    return y.reshape(shape)


@cache
def _matrix(n: int) -> np.ndarray:
    """`H_n / sqrt(n)`, float32 `(n, n)`."""
    import numpy as np

    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / n**0.5).astype(np.float32)
