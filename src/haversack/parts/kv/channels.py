"""Chosen channels: each KV head's keys and values in another order, or the keys with some left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.errors import UsageError
from haversack.ledger import StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.kv.base import Project, Projection
from haversack.parts.kv.projected import narrower
from haversack.parts.kv.slabs import allocate

if TYPE_CHECKING:
    import torch

MAX_HEAD_DIM = 256
"""A channel's number is stored in a byte."""

Channels = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ChosenChannels(Project):
    """Store the channels of `key_channels[h]` of KV head h's keys, and of `value_channels[h]` of its values, in that order (empty: all as they come).

    Keys may leave channels out, as many in each head; queries leave out the same. Values are only put in another order, which outputs
    are put back from. Bytes: those of heads of the stored width, and a byte per stored channel and KV head. Error: none where no channel is left
    out, for sums of products don't know their order; else what the left out channels add to the logits. Differs from the source, which
    folds the order into the weights before the rotary embedding, in that rotated queries and keys are put in order as they come: any
    order will do, and none need keep a rotation's pairs together.
    """

    id: ClassVar[str] = "kv.channels"
    title: ClassVar[str] = "Channels of each head in another order, those that matter least left out"
    source: ClassVar[Source | None] = Source(
        "Trukhanov and Soloveychik", 2024, "Accurate Block Quantization in LLMs with Outliers", "2403.20137", "section 3"
    )  # fmt: skip

    key_channels: Channels = ()
    value_channels: Channels = ()

    def __post_init__(self) -> None:
        for name in ("key_channels", "value_channels"):
            channels = tuple(tuple(int(c) for c in head) for head in getattr(self, name))  # JSON has lists
            object.__setattr__(self, name, channels)
            fine = all(len(set(head)) == len(head) == len(channels[0]) > 0 for head in channels)
            fine = fine and all(0 <= c < MAX_HEAD_DIM for head in channels for c in head)
            check_range(self.id, name, channels, f"as many distinct channels below {MAX_HEAD_DIM} for each head", fine)

    @property
    def label(self) -> str:
        what = [f"{len(c[0])} channels of {name}" for name, c in self._named if c]
        return " and ".join(what) + " in order" if what else "channels as they are"

    @property
    def _named(self) -> tuple[tuple[str, Channels], ...]:
        return ("keys", self.key_channels), ("values", self.value_channels)

    def inside(self, site: AttentionSite) -> AttentionSite:
        for (name, channels), width in zip(self._named, (site.key_head_dim, site.value_head_dim)):
            highest = max((c for head in channels for c in head), default=-1)
            if channels and (len(channels) != site.num_kv_heads or highest >= width):
                raise UsageError(
                    f"{self.id} chooses channels up to {highest} of {len(channels)} heads, but {site.id} has {site.num_kv_heads} KV "
                    f"heads with {name} of {width} channels."
                )
        if self.value_channels and len(self.value_channels[0]) != site.value_head_dim:
            raise UsageError(f"{self.id} can't leave channels of values out: outputs need all {site.value_head_dim}.")
        width = len(self.key_channels[0]) if self.key_channels else site.key_head_dim
        return narrower(site, site.num_kv_heads, width, site.value_head_dim)

    def stored(self, site: AttentionSite) -> tuple[StoredTensor, ...]:
        return tuple(
            StoredTensor(name, "U8", (len(channels), len(channels[0]))) for name, channels in self._named if channels
        )

    def build(self, site: AttentionSite, device: str | torch.device) -> Projection:
        import torch

        self.inside(site)  # refuses other heads
        tensors = allocate(self.stored(site), device)
        for name, channels in self._named:
            if channels:
                tensors[name].copy_(torch.tensor(channels))
        return _Order(tensors)


class _Order(Projection):
    """Gathers channels by the stored numbers."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        return self._taken(x, "keys")

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        return self._taken(x, "keys")

    def values(self, x: torch.Tensor) -> torch.Tensor:
        return self._taken(x, "values")

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        return self._taken(x, "values", back=True)

    def _taken(self, x: torch.Tensor, name: str, *, back: bool = False) -> torch.Tensor:
        if name not in self.tensors:
            return x
        places = self.tensors[name].long()
        if back:
            places = places.argsort(-1)
        groups = x.shape[1] // places.shape[0]
        places = places.repeat_interleave(groups, 0)[None, :, None]
        return x.gather(3, places.expand(x.shape[0], -1, x.shape[2], -1))


def by_falling(weights: Sequence[Sequence[float]], num_channels: int | None = None) -> Channels:
    """Each head's channels by falling weight, the first `num_channels` of them (None: all)."""
    orders = (sorted(range(len(head)), key=lambda c: -head[c]) for head in weights)
    return tuple(tuple(order[:num_channels]) for order in orders)
