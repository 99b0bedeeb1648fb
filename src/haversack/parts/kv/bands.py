"""A ragged layer: KV heads of one option lie together in a layer of their own, and the layer is made of those.

Each band is a layer over a site with fewer heads, so that every part works per head without knowing it: some heads hold
all tokens, others a window; some are packed, others not. Queries, keys and values are cut by heads and outputs put together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from haversack.describe.site import AttentionSite
from haversack.ledger import DTYPE_BYTES
from haversack.parts.kv.base import Attending, Band, KVLayer

if TYPE_CHECKING:
    import torch


class BandedLayer(KVLayer):
    """`layers[i]` holds the heads of `bands[i]`; its slabs are named after the band."""

    def __init__(self, site: AttentionSite, bands: Sequence[Band], layers: Sequence[KVLayer]):
        self.site = site
        self.bands = tuple(bands)
        self.layers = tuple(layers)
        self.batch_size = layers[0].batch_size
        self.tensors = {f"{b.name}.{name}": t for b, layer in self._each() for name, t in layer.tensors.items()}

    def _each(self) -> Iterator[tuple[Band, KVLayer]]:
        return zip(self.bands, self.layers, strict=True)

    @property
    def elsewhere(self) -> dict[str, str]:
        return {f"{b.name}.{name}": tier for b, layer in self._each() for name, tier in layer.elsewhere.items()}

    def max_bytes(self) -> int:
        return sum(layer.max_bytes() for layer in self.layers)

    def seen_tokens(self) -> tuple[int, ...]:
        return self.layers[0].seen_tokens()

    def held_positions(self, row: int) -> tuple[int, ...]:
        """Positions that any head holds."""
        return tuple(sorted({position for layer in self.layers for position in layer.held_positions(row)}))

    # Growing and attending

    def append(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None = None) -> None:
        for band, layer in self._each():
            layer.append(cut_heads(keys, band.heads), cut_heads(values, band.heads), real)

    def weigh(self, weights: torch.Tensor) -> None:
        for layer in self.layers:
            layer.weigh(weights)

    def _attend(
        self, query: torch.Tensor, new_keys: torch.Tensor | None, new_values: torch.Tensor | None, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._joined(lambda layer, *given: layer._attend(*given), query, new_keys, new_values, how)

    def _step(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._joined(lambda layer, *given: layer._step(*given), query, keys, values, how)

    def _peek(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._joined(lambda layer, *given: layer._peek(*given), query, keys, values, how)

    def _joined(
        self,
        act: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        query: torch.Tensor,
        new_keys: torch.Tensor | None,
        new_values: torch.Tensor | None,
        how: Attending,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What every band's layer answers to `act(layer, query, keys, values, how)` on its heads, put together."""
        import torch

        batch_size, num_heads, num_queries, _ = query.shape
        shape = (batch_size, num_queries, num_heads, self.site.value_head_dim)
        output = query.new_empty(shape).transpose(1, 2)
        lse = torch.empty((batch_size, num_heads, num_queries), dtype=torch.float32, device=query.device)
        groups = self.site.num_heads // self.site.num_kv_heads
        for band, layer in self._each():
            queries = tuple(head * groups + i for head in band.heads for i in range(groups))
            new = [None if x is None else cut_heads(x, band.heads) for x in (new_keys, new_values)]
            sinks = None if how.sinks is None else cut_heads(how.sinks[None], queries)[0]
            inside = Attending(how.scaling, how.softcap, sinks, how.real)
            cut = cut_heads(query, queries)
            part, part_lse = act(layer, cut, *new, inside)
            _put(output, queries, part)
            _put(lse, queries, part_lse)
            del cut, new, part, part_lse
        return output, lse

    # Batches

    def reorder(self, index: torch.Tensor) -> None:
        for layer in self.layers:
            layer.reorder(index)

    def resized(self, index: torch.Tensor) -> BandedLayer:
        return BandedLayer(self.site, self.bands, [layer.resized(index) for layer in self.layers])

    def check_crop(self, num_tokens: int) -> None:
        for layer in self.layers:
            layer.check_crop(num_tokens)

    def _forget(self, num_tokens: int) -> None:
        for layer in self.layers:
            layer._forget(num_tokens)

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()

    def state(self) -> dict[str, torch.Tensor]:
        return {f"{band.name}.{name}": t for band, layer in self._each() for name, t in layer.state().items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        for band, layer in self._each():
            start = f"{band.name}."
            layer.load_state({name[len(start) :]: t for name, t in state.items() if name.startswith(start)})


def bands_workspace_bytes(
    site: AttentionSite, bands: Sequence[Band], *, batch_size: int, capacity_tokens: int, new_tokens: int, dtype: str
) -> int:
    """The most of any band, with its cut of the inputs where its heads don't lie side by side, and its output before it is put in place."""
    most = 0
    for band in bands:
        inside = band.option.workspace_bytes(
            band.site, batch_size=batch_size, capacity_tokens=capacity_tokens, new_tokens=new_tokens, dtype=dtype
        )
        part, rows = band.site, batch_size * new_tokens
        held = rows * part.num_heads * (part.value_head_dim * DTYPE_BYTES[dtype] + DTYPE_BYTES["F32"])
        if not _is_span(band.heads):
            both = part.key_head_dim + part.value_head_dim
            held += rows * (part.num_heads * part.key_head_dim + part.num_kv_heads * both) * DTYPE_BYTES[dtype]
            held += 2 * 8 * part.num_heads  # places of heads
        most = max(most, inside + held)
    return most + batch_size * site.num_heads * new_tokens * DTYPE_BYTES["F32"]


def _is_span(heads: Sequence[int]) -> bool:
    return heads[-1] - heads[0] + 1 == len(heads)


def cut_heads(x: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """Heads of `(batch, heads, ...)`: a view where they lie side by side."""
    if _is_span(heads):
        return x[:, heads[0] : heads[-1] + 1]
    import torch

    return x.index_select(1, torch.tensor(heads, device=x.device))


def _put(whole: torch.Tensor, heads: Sequence[int], part: torch.Tensor) -> None:
    if _is_span(heads):
        whole[:, heads[0] : heads[-1] + 1] = part
    else:
        import torch

        whole.index_copy_(1, torch.tensor(heads, device=whole.device), part)
