"""Live tensor bytes of real model code, without memory: predictions from tensors on `meta`.

Every storage that an operation creates is counted from its creation to its release; operators of ours add the workspace
that they declare. What is measured later comes from other instruments (the allocator's own reports).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts bytes of storages created while active: `live_bytes` now, `peak_bytes` the most at one time.

    `workspace` maps an operator to a function of its arguments that gives the bytes it allocates inside and frees
    again.
    """

    def __init__(self, workspace: dict[Any, Callable[..., int]] | None = None):
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        self._workspace = workspace or {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        inside = self._workspace.get(func)
        if inside is not None:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes + inside(*args, **(kwargs or {})))
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)
