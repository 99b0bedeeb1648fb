"""Memory in pages of 2 MiB instead of 4 KiB where the system gives them when asked.

A disk request into scattered 4 KiB pages is cut into as many pieces: one machine's virtual disk read 0.8 GB/s into
them and 2.4 GB/s into huge pages. First touches are fewer, too.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch

HUGE_PAGE_BYTES = 2 << 20


def on_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, its storage's untouched pages promised to be huge ones: to be called before anything is written.

    Only whole huge pages within the storage are asked for, so that it takes no byte more; smaller ones, and systems
    without them, change nothing.
    """
    advise = _madvise()
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    stop = (storage.data_ptr() + storage.nbytes()) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if advise is not None and start < stop:
        advise(start, stop - start, mmap.MADV_HUGEPAGE)  # refused where there are none, which loses nothing
    return tensor


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function
