"""A layer that stores projected heads: queries, keys and values are projected as they come, outputs are turned back.

What stores them is any other layer, over a site with heads of another width, so that everything composes with a projection: tokens
that heads choose, few bits, windows, compiled attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from haversack.describe.site import AttentionSite
from haversack.ledger import DTYPE_BYTES
from haversack.parts.kv.base import Attending, KVLayer, Projection

if TYPE_CHECKING:
    import torch


class ProjectedLayer(KVLayer):
    """`store` holds what `projection` makes of keys and values."""

    def __init__(self, site: AttentionSite, projection: Projection, store: KVLayer):
        self.site = site
        self.projection = projection
        self.store = store
        self.batch_size = store.batch_size
        self.tensors = {**store.tensors, **{f"projection.{name}": t for name, t in projection.tensors.items()}}

    @property
    def elsewhere(self) -> dict[str, str]:
        return self.store.elsewhere

    def max_bytes(self) -> int:
        return self.store.max_bytes() + sum(tensor.nbytes for tensor in self.projection.tensors.values())

    def seen_tokens(self) -> tuple[int, ...]:
        return self.store.seen_tokens()

    def held_positions(self, row: int) -> tuple[int, ...]:
        return self.store.held_positions(row)

    def join(self, before: KVLayer) -> None:
        self.store.join(before.store if isinstance(before, ProjectedLayer) else before)

    # Growing and attending

    def append(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None = None) -> None:
        self.store.append(self.projection.keys(keys), self.projection.values(values), real)

    def _attend(
        self, query: torch.Tensor, new_keys: torch.Tensor | None, new_values: torch.Tensor | None, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys = None if new_keys is None else self.projection.keys(new_keys)
        values = None if new_values is None else self.projection.values(new_values)
        output, lse = self.store._attend(self.projection.queries(query), keys, values, how)
        return self.projection.outputs(output), lse

    def _step(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        projected = self.projection.keys(keys), self.projection.values(values)
        output, lse = self.store._step(self.projection.queries(query), *projected, how)
        return self.projection.outputs(output), lse

    def _peek(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        projected = self.projection.keys(keys), self.projection.values(values)
        output, lse = self.store._peek(self.projection.queries(query), *projected, how)
        return self.projection.outputs(output), lse

    def weigh(self, weights: torch.Tensor) -> None:
        self.store.weigh(weights)

    # Batches

    def reorder(self, index: torch.Tensor) -> None:
        self.store.reorder(index)

    def resized(self, index: torch.Tensor) -> ProjectedLayer:
        return ProjectedLayer(self.site, self.projection, self.store.resized(index))

    def check_crop(self, num_tokens: int) -> None:
        self.store.check_crop(num_tokens)

    def _forget(self, num_tokens: int) -> None:
        self.store._forget(num_tokens)

    def reset(self) -> None:
        self.store.reset()

    def state(self) -> dict[str, torch.Tensor]:
        """The store's: a projection belongs to the option, and so to the plan."""
        return self.store.state()

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self.store.load_state(state)


def projection_workspace_bytes(
    site: AttentionSite, inside: AttentionSite, *, batch_size: int, new_tokens: int, dtype: str
) -> int:
    """New queries, keys and values as they are stored and the output before it is turned back; beside them the widest input in float32
    twice, and the projection in float32 and in integers."""
    rows, f32, own = batch_size * new_tokens, DTYPE_BYTES["F32"], DTYPE_BYTES[dtype]
    held = inside.num_heads * (inside.key_head_dim + inside.value_head_dim)
    held += inside.num_kv_heads * (inside.key_head_dim + inside.value_head_dim)
    widest = site.num_heads * max(site.key_head_dim, site.value_head_dim, inside.key_head_dim, inside.value_head_dim)
    dims = max(site.key_head_dim * inside.key_head_dim, site.value_head_dim * inside.value_head_dim)
    return rows * (held * own + 2 * widest * f32) + 2 * f32 * site.num_heads * dims


def narrower(site: AttentionSite, num_kv_heads: int, key_head_dim: int, value_head_dim: int) -> AttentionSite:
    """The site with other heads; what its rotary embedding does to their channels is not known."""
    return replace(
        site, num_kv_heads=num_kv_heads, key_head_dim=key_head_dim, value_head_dim=value_head_dim, rope_theta=None
    )
