"""Activations kept in 8 bits for the backward pass: layers compute with exact numbers, gradients with rounded ones."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from haversack.engine.recompute import decoder_layers

GROUP = 128
"""Numbers that share a scale and a smallest value, where the last axis is longer than this and a multiple of it."""

LEAST_SHARE = 4
"""Tensors with fewer numbers per token than a fourth of the hidden state's are kept as they are: they are statistics of norms and of
attention, which gradients depend on most and which take few bytes."""


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
    length = tensor.shape[-1]
    width = GROUP if length > GROUP and length % GROUP == 0 else length
    rows = tensor.detach().reshape(-1, width).float()
    least, most = rows.aminmax(dim=-1, keepdim=True)
    scales = ((most - least) / 255).clamp_min(torch.finfo(torch.float32).tiny)
    codes = ((rows - least) / scales).round_().clamp_(0, 255).to(torch.uint8)
    return PackedActivation(codes, scales, least, tensor.shape, tensor.dtype)


class SaveInEightBits:
    """Lets the decoder layers of a transformers model keep 8 bits of each activation for their backward pass; usable in anybody's loop.

    As a context manager it gives the model back as it was; otherwise it lasts until `remove`. Forward results are the same to the bit,
    gradients are not. What is kept takes 1 byte per number and 8 per group of up to 128, or per row of a head; a tensor that several operations keep is kept
    once. Weights, masks, rotary tables and small statistics stay as they are. Source: Pan et al. 2021, arXiv 2111.11124, whose heads have
    statistics of their own, as rows of a head do here; differs in that scales are those of the numbers at hand and not running estimates.
    """

    def __init__(self, model: Any):
        self._weights = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._packed: dict[tuple[Any, ...], tuple[weakref.ref[Any], weakref.ref[PackedActivation]]] = {}
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

    def __enter__(self) -> SaveInEightBits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        shared = torch.utils._pytree.tree_leaves((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))
        self._exact = {_storage(tensor) for tensor in shared if isinstance(tensor, torch.Tensor)}
        self._least_numbers = hidden.numel() // LEAST_SHARE
        self._packed = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        hooks.__enter__()
        self._active.append(hooks)

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._active:
            self._active.pop().__exit__(None, None, None)
        self._packed = {}

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | PackedActivation:
        own = _storage(tensor)
        if not tensor.is_floating_point() or own in self._weights or own in self._exact:
            return tensor
        if tensor.numel() < self._least_numbers:
            return tensor
        storage = tensor.untyped_storage()
        key = (own, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version)
        held = self._packed.get(key)
        if held is not None and held[0]() is not None and (packed := held[1]()) is not None:
            return packed
        packed = pack(tensor)
        self._packed[key] = (weakref.ref(storage), weakref.ref(packed))
        return packed


def _unpack(kept: torch.Tensor | PackedActivation) -> torch.Tensor:
    return kept.unpack() if isinstance(kept, PackedActivation) else kept


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
