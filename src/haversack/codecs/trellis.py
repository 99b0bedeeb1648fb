"""The value tables of trellis codes: what the last bits of a row of codes stand for.

A code of b bits and the bits of the codes before it, `WINDOW_BITS` in all with the newest lowest, are an index into a
table of values of variance 1 (Tseng et al. 2024, arXiv 2406.11235, section 3.1: bitshift trellis). The tables were
trained on normal samples by `reference/trellis.py`: 256, 512 and 256 float16 values, 2 KiB in all, which come with the
package. Mean squared error on normal samples, by a full search: 0.079 at 2 bits, 0.021 at 3, 0.0056 at 4 (least
possible: 0.0625, 0.0156, 0.0039).
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WINDOW_BITS = {2: 8, 3: 9, 4: 8}
"""Bits of a table's index, by bits of a code. Larger windows did not pay with the beams that a search can afford."""


@cache
def trellis_table(bits: int) -> torch.Tensor:
    """float32 `(2^WINDOW_BITS[bits],)`."""
    from safetensors.torch import load

    data = resources.files("haversack.codecs").joinpath("trellis.safetensors").read_bytes()
    return load(data)[f"bits{bits}"].float()
