"""What decoder layers keep of their activations for the backward pass: all of it in 8 bits, as 8-bit floats, or as it is in a file."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from haversack.engine.recompute import decoder_layers
from haversack.formats.safetensors_file import explained

GROUP = 128
"""Numbers that share a scale and a smallest value, where the last axis is longer than this and a multiple of it."""

FLOAT8_LARGEST = 448.0
"""Of e4m3."""

LEAST_SHARE = 4
"""Tensors with fewer numbers per token than a fourth of the hidden state's are kept as they are: they are statistics of norms and of
attention, which gradients depend on most and which take few bytes."""


class Kept(Protocol):
    """An activation in another form or place."""

    def unpack(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class PackedActivation:
    """Codes uint8 `(groups, numbers)`, and per group a scale and a smallest value in float32."""

    codes: torch.Tensor
    scales: torch.Tensor
    least: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype

    def unpack(self) -> torch.Tensor:
        values = torch.addcmul(self.least, self.codes.float(), self.scales)
        return values.to(self.dtype).view(self.shape)


def pack(tensor: torch.Tensor) -> PackedActivation:
    """The nearest of 256 even steps in each group along the last axis: an error of at most 1/510 of the group's range."""
    rows = _groups(tensor)
    least, most = rows.aminmax(dim=-1, keepdim=True)
    scales = ((most - least) / 255).clamp_min(torch.finfo(torch.float32).tiny)
    codes = ((rows - least) / scales).round_().clamp_(0, 255).to(torch.uint8)
    return PackedActivation(codes, scales, least, tensor.shape, tensor.dtype)


@dataclass(frozen=True)
class FloatActivation:
    """Codes float8 e4m3 `(groups, numbers)`, and per group a scale in float32."""

    codes: torch.Tensor
    scales: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype

    def unpack(self) -> torch.Tensor:
        return self.codes.float().mul_(self.scales).to(self.dtype).view(self.shape)


def pack_floats(tensor: torch.Tensor) -> FloatActivation:
    """The nearest 8-bit floats under each group's largest magnitude: an error of at most 1/16 of a number, above subnormal ones."""
    rows = _groups(tensor)
    scales = (rows.abs().amax(dim=-1, keepdim=True) / FLOAT8_LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (rows / scales).to(torch.float8_e4m3fn)
    return FloatActivation(codes, scales, tensor.shape, tensor.dtype)


def _groups(tensor: torch.Tensor) -> torch.Tensor:
    """Groups along the last axis, float32 `(groups, numbers)`."""
    length = tensor.shape[-1]
    width = GROUP if length > GROUP and length % GROUP == 0 else length
    return tensor.detach().reshape(-1, width).float()


class ActivationFile:
    """Activations in one file without a name: it is gone when the process is. Its pages are the page cache's, not the process's.

    The file grows to what is kept at once and is used again from its beginning when nothing of it is needed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        with explained(folder, 0):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as this
        self.end_bytes = self.num_kept = 0

    def keep(self, tensor: torch.Tensor) -> ActivationOnDisk:
        """Write a tensor. Raises OutputError where the disk is full."""
        if not self.num_kept:
            self.end_bytes = 0
        strides = tensor.stride()
        order = sorted(range(tensor.ndim), key=lambda axis: -strides[axis])
        laid = tensor.detach().permute(order)  # as it lies in memory, so that products add up in the same order again
        kept = ActivationOnDisk(self, self.end_bytes, laid.shape, tuple(order), tensor.dtype)
        self.num_kept += 1
        weakref.finalize(kept, self._forget)
        self.end_bytes += tensor.nbytes
        if not isinstance(tensor, FakeTensor):
            raw = memoryview(laid.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            with explained(self.folder, tensor.nbytes):
                done = 0
                while done < len(raw):
                    done += os.pwrite(self._file.fileno(), raw[done:], kept.start + done)
        return kept

    @property
    def held_bytes(self) -> int:
        """Bytes up to the end of what is kept."""
        return self.end_bytes if self.num_kept else 0

    def read(self, start: int, tensor: torch.Tensor) -> None:
        """Fill a contiguous tensor from a place in the file."""
        raw = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
        done = 0
        while done < len(raw):
            done += os.preadv(self._file.fileno(), [raw[done:]], start + done)

    def _forget(self) -> None:
        self.num_kept -= 1


@dataclass(frozen=True, eq=False)
class ActivationOnDisk:
    """Where a tensor lies in a file: its axes in the order of memory, of which `order` names the tensor's own."""

    file: ActivationFile
    start: int
    shape: torch.Size
    order: tuple[int, ...]
    dtype: torch.dtype

    def unpack(self) -> torch.Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if not isinstance(tensor, FakeTensor):
            self.file.read(self.start, tensor)
        return tensor.permute([self.order.index(axis) for axis in range(len(self.order))])


class KeptElsewhere:
    """While it lasts, the decoder layers of a transformers model keep activations as `keep` gives them; usable in anybody's loop.

    As a context manager it gives the model back as it was; otherwise it lasts until `remove`. A tensor that several operations of a layer
    keep is kept once. Weights, masks, rotary tables and small statistics stay as they are.
    """

    def __init__(self, model: Any, keep: Callable[[torch.Tensor], Kept]):
        self._keep = keep
        self._layer: nn.Module | None = None
        self._weights: set[int] | None = None
        self._packed: dict[tuple[Any, ...], tuple[weakref.ref[Any], weakref.ref[Kept]]] = {}
        self._exact: set[int] = set()
        self._least_numbers = 0
        self._active: list[Any] = []
        self._handles = []
        for layer in decoder_layers(model):
            self._handles.append(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        """Let layers keep what they compute with."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> KeptElsewhere:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        shared = torch.utils._pytree.tree_leaves((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))
        self._exact = {_storage(tensor) for tensor in shared if isinstance(tensor, torch.Tensor)}
        self._layer, self._weights = layer, None
        self._least_numbers = hidden.numel() // LEAST_SHARE
        self._packed = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        hooks.__enter__()
        self._active.append(hooks)

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._active:
            self._active.pop().__exit__(None, None, None)
        self._packed = {}

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | Kept:
        own = _storage(tensor)
        if self._weights is None:  # as they are while the layer runs
            assert self._layer is not None
            self._weights = {_storage(own) for own in (*self._layer.parameters(), *self._layer.buffers())}
        if not tensor.is_floating_point() or own in self._weights or own in self._exact:
            return tensor
        if tensor.numel() < self._least_numbers:
            return tensor
        storage = tensor.untyped_storage()
        key = (own, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version)
        held = self._packed.get(key)
        if held is not None and held[0]() is not None and (packed := held[1]()) is not None:
            return packed
        packed = self._keep(tensor)
        self._packed[key] = (weakref.ref(storage), weakref.ref(packed))
        return packed


class SaveInEightBits(KeptElsewhere):
    """Activations in 8 bits: 1 byte per number, and 8 per group of up to 128 or per row of a head.

    Forward results are the same to the bit, gradients are not. Source: Pan et al. 2021, arXiv 2111.11124, whose heads have statistics of
    their own, as rows of a head do here; differs in that scales are those of the numbers at hand and not running estimates.
    """

    def __init__(self, model: Any):
        super().__init__(model, pack)


class SaveAsFloat8(KeptElsewhere):
    """Activations as 8-bit floats (e4m3): 1 byte per number, and 4 per group of up to 128 or per row of a head.

    Forward results are the same to the bit, gradients are not. Source: Xi et al. 2024, arXiv 2410.19313, section 5; differs in that groups are
    the same everywhere, and in that products are computed from activations as they were.
    """

    def __init__(self, model: Any):
        super().__init__(model, pack_floats)


class SaveOnDisk(KeptElsewhere):
    """Activations as they are in a file within `folder`, at the price of writing and reading them: the result is the same to the bit.

    Memory holds one layer's while it computes. Source: Zhao et al. 2024, arXiv 2407.12117, which takes them to the host; differs in that the
    tier is a disk, and in that all tokens go there.
    """

    def __init__(self, model: Any, folder: Path):
        self.file = ActivationFile(folder)
        super().__init__(model, self.file.keep)


def _unpack(kept: torch.Tensor | Kept) -> torch.Tensor:
    return kept if isinstance(kept, torch.Tensor) else kept.unpack()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
