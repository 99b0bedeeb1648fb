"""Layers of slabs of their own: how their rows, one per sequence, are reordered, copied, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Self

from haversack.describe.site import AttentionSite
from haversack.errors import UsageError
from haversack.ledger import StoredTensor, total_bytes
from haversack.parts.kv.base import KEY_BLOCK_TOKENS_PREFILL, KVLayer, Regions

if TYPE_CHECKING:
    import torch


class SlabLayer(KVLayer):
    """A layer whose slabs `(batch, kv_heads, slots, ...)` and counters hold all that it knows of a sequence.

    `counters` names lists of one integer per sequence, 0 where nothing was seen; they go wherever their row goes, and the first is how many real tokens it
    has seen. `rebuild` makes an empty layer like this one for another batch size.
    """

    counters: ClassVar[tuple[str, ...]]
    counts: list[int]

    def __init__(
        self,
        site: AttentionSite,
        regions: Regions,
        *,
        batch_size: int,
        declared: tuple[StoredTensor, ...],
        tensors: dict[str, torch.Tensor],
        rebuild: Callable[[int], KVLayer],
    ):
        self.site = site
        self.regions = regions
        self.batch_size = batch_size
        self.declared = declared
        self.tensors = tensors
        self.rebuild = rebuild
        self.reset()

    @property
    def elsewhere(self) -> dict[str, str]:
        return {t.name: t.tier for t in self.declared if t.tier != "device"}

    def max_bytes(self) -> int:
        return total_bytes(self.declared)

    def seen_tokens(self) -> tuple[int, ...]:
        return tuple(self.counts)

    def used_slots(self, name: str) -> int:
        """Slots of a slab, along its third axis, that some row has written to."""
        return self.tensors[name].shape[2]

    def reset(self) -> None:
        for name in self.counters:
            setattr(self, name, [0] * self.batch_size)

    def reorder(self, index: torch.Tensor) -> None:
        order = [int(i) for i in index]
        if len(order) != self.batch_size:
            raise UsageError(f"{self.site.id}: {len(order)} rows were asked of a cache of {self.batch_size}.")
        if order == list(range(self.batch_size)):
            return
        for name, tensor in self.tensors.items():
            used = self.used_slots(name)
            for first in range(0, used, KEY_BLOCK_TOKENS_PREFILL):  # the workspace
                block = tensor[:, :, first : min(first + KEY_BLOCK_TOKENS_PREFILL, used)]
                block.copy_(block.index_select(0, index.to(tensor.device)))
        self._take_counters(self, order)

    def resized(self, index: torch.Tensor) -> Self:
        order = [int(i) for i in index]
        other = self.rebuild(len(order))
        assert isinstance(other, type(self))
        for name, tensor in self.tensors.items():
            for row, source in enumerate(order):
                other.tensors[name][row] = tensor[source]
        other._take_counters(self, order)
        return other

    def _take_counters(self, source: SlabLayer, order: list[int]) -> None:
        for name in self.counters:
            before = getattr(source, name)
            setattr(self, name, [before[i] for i in order])

    def state(self) -> dict[str, torch.Tensor]:
        import torch

        return {**self.tensors, "rows": torch.tensor([getattr(self, name) for name in self.counters])}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        expected = {name: tuple(t.shape) for name, t in self.tensors.items()}
        for name, shape in {**expected, "rows": (len(self.counters), self.batch_size)}.items():
            found = tuple(state[name].shape) if name in state else None
            if found != shape:
                raise UsageError(f"{self.site.id}: the saved cache's {name} is {found}, but this cache needs {shape}.")
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])
        for name, row in zip(self.counters, state["rows"].tolist(), strict=True):
            setattr(self, name, row)
