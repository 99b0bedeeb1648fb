"""Live tensor bytes of real model code, without memory: predictions from tensors on `meta`.

Every storage that an operation creates is counted from its creation to its release; operators of ours add the workspace
that they declare. What is measured later comes from other instruments (the allocator's own reports).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NUMBER_BYTES = 24
"""Of a number where torch wants a tensor: made in 64 bits, again where a dispatch mode passes it on, and once in the other's dtype."""


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
        elif func._overloadname == "Tensor" and any(isinstance(x, int | float) for x in args[:2]):
            self.peak_bytes = max(self.peak_bytes, self.live_bytes + NUMBER_BYTES)
        return out

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count nothing for the storages of tensors that were there before, whatever views are taken of them."""
        for tensor in tensors:
            self._sizes.setdefault(tensor.untyped_storage()._cdata, 0)

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


@dataclass(frozen=True)
class Segment:
    """A stretch of a run: live bytes by owner at its start, at its highest moment, and at its end."""

    name: str
    start: Mapping[str, int]
    peak: Mapping[str, int]
    end: Mapping[str, int]

    @property
    def rise_bytes(self) -> int:
        """What its highest moment holds more than its start."""
        return sum(self.peak.values()) - sum(self.start.values())


WORKSPACE = "workspace"
"""The owner of what operators allocate inside and free again."""


AUTOGRAD_ENGINE = "_engine_run_backward"
"""The last function of torch's in Python before its engine runs backward passes in C++."""


class OwnedBytes(LiveBytes):
    """Live bytes by owner: a new storage belongs to `owner`, until it is assigned to another. `cut` ends a segment."""

    def __init__(self, workspace: dict[Any, Callable[..., int]] | None = None):
        super().__init__(workspace)
        self.owner = ""
        self.by_owner: dict[str, int] = {}
        self.segments: list[Segment] = []
        self._owners: dict[int, str] = {}
        self._start: dict[str, int] = {}
        self._peak: dict[str, int] = {}
        self._peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and _engine_asks():
            func, args = _in_place(args)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        inside = self._workspace.get(func)
        if inside is not None:
            self._note(inside(*args, **(kwargs or {})))
        return out

    def assign(self, tensor: torch.Tensor, owner: str) -> None:
        """Book a tensor's storage on another owner, if it was made while this counted."""
        key = tensor.untyped_storage()._cdata
        if key in self._owners and self._owners[key] != owner:
            num_bytes = self._sizes[key]
            self.by_owner[self._owners[key]] -= num_bytes
            self._owners[key] = owner
            self.by_owner[owner] = self.by_owner.get(owner, 0) + num_bytes

    def cut(self, name: str) -> None:
        """End the segment that began at the last cut, under this name."""
        self.segments.append(Segment(name, self._start, self._peak, dict(self.by_owner)))
        self._start = self._peak = dict(self.by_owner)
        self._peak_bytes = self.live_bytes

    def _see(self, tensor: torch.Tensor) -> None:
        before = self.live_bytes
        super()._see(tensor)
        if self.live_bytes == before:
            return
        self._owners[tensor.untyped_storage()._cdata] = self.owner
        self.by_owner[self.owner] = self.by_owner.get(self.owner, 0) + self.live_bytes - before
        self._note(0)

    def _note(self, workspace_bytes: int) -> None:
        if self.live_bytes + workspace_bytes > self._peak_bytes:
            self._peak_bytes = self.live_bytes + workspace_bytes
            self._peak = dict(self.by_owner)
            if workspace_bytes:
                self._peak[WORKSPACE] = self._peak.get(WORKSPACE, 0) + workspace_bytes

    def _release(self, key: int) -> None:
        owner = self._owners.pop(key, None)
        if owner is not None:
            self.by_owner[owner] -= self._sizes[key]
        super()._release(key)


def _engine_asks() -> bool:
    """Whether the operation under way comes from the autograd engine, and not from Python code of anyone's."""
    frame = sys._getframe(2)
    while frame.f_code.co_name != AUTOGRAD_ENGINE:
        if not frame.f_globals.get("__name__", "").startswith("torch.") or frame.f_back is None:
            return False
        frame = frame.f_back
    return True


def _in_place(operands: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
    """The engine's sum of two gradients as it is done on plain tensors: into the one that came first, if that is no view (a tied head's is)
    and fills its storage. On tensors like fakes, which may be subclasses, it makes a third (torch 2.13,
    `torch/csrc/autograd/input_buffer.cpp`)."""
    one, other = operands
    fills = one.nbytes == one.untyped_storage().nbytes() and one.shape == other.shape and one.dtype == other.dtype
    if fills and not one._is_view():
        return torch.ops.aten.add_.Tensor, operands
    return torch.ops.aten.add.Tensor, operands
