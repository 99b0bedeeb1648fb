"""A whole cache within a byte budget: what recipes that are asked for one share.

A recipe's `whole_cache` turns a `CacheBudget` into one option per layer. Most have one number that grows with the bytes; the
largest that fits is found here, by bytes as declared, so that scales, positions and the block being filled count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from haversack.describe.site import AttentionSite
from haversack.errors import DoesNotFitError
from haversack.parts.kv.base import KVOption, Selection
from haversack.parts.kv.low_rank import LowRankKV
from haversack.units import format_bytes

if TYPE_CHECKING:
    import torch

    from haversack.parts.kv.non_uniform import NonUniformKV

Options = tuple[KVOption, ...]
"""One per layer, in order."""

SINK_TOKENS = 4
MAX_BLOCK_TOKENS = 64


class ChannelStatistics(Protocol):
    """What recipes ask of a layer's channels; `engine.channel_moments` measures it."""

    @property
    def query_energy(self) -> list[list[float]]: ...

    @property
    def key_energy(self) -> list[list[float]]: ...

    @property
    def value_energy(self) -> list[list[float]]: ...

    def fitted(self, part: LowRankKV, *, per_frequency: bool = False) -> LowRankKV: ...

    def turned_to_before(self) -> LowRankKV: ...


class HeadStatistics(Protocol):
    """What recipes ask of a model's heads; `engine.attention_statistics` measures it, and says in which shapes."""

    @property
    def mass(self) -> torch.Tensor: ...

    @property
    def dispersion(self) -> list[float]: ...

    @property
    def shift(self) -> list[float]: ...

    @property
    def retrieval(self) -> list[list[float]]: ...

    @property
    def head_damage(self) -> list[list[float]]: ...

    @property
    def eviction_damage(self) -> list[float]: ...

    @property
    def channels(self) -> Sequence[ChannelStatistics]: ...

    def tables(self, part: NonUniformKV) -> list[tuple[tuple[float, ...], tuple[float, ...]]]: ...


@dataclass(frozen=True)
class CacheBudget:
    """Layers whose caches together may take `num_bytes` for one sequence of `capacity_tokens`.

    `statistics` are measured on the model for the recipes that ask for them (`HeadStatistics`), else None.
    """

    sites: tuple[AttentionSite, ...]
    capacity_tokens: int
    dtype: str
    num_bytes: int
    statistics: HeadStatistics | None = None

    @property
    def most_tokens(self) -> int:
        """What is worth asking for: with a block to spare nothing is ever dropped."""
        return self.capacity_tokens + MAX_BLOCK_TOKENS

    @property
    def whole(self) -> Options:
        """Every token as it is."""
        return (KVOption(),) * len(self.sites)

    def bytes_of(self, options: Sequence[KVOption]) -> int:
        """Declared bytes of a whole cache."""
        return sum(
            option.stored_bytes(site, batch_size=1, capacity_tokens=self.capacity_tokens, dtype=self.dtype)
            for site, option in zip(self.sites, options, strict=True)
        )

    def largest(self, make: Callable[[int], Options], limit: int) -> Options:
        """`make(n)` for the largest n up to `limit` that fits, bytes growing with n.

        Raises DoesNotFitError where even `make(1)` doesn't: a budget below what the recipe must hold.
        """
        if (needed := self.bytes_of(make(1))) > self.num_bytes:
            raise DoesNotFitError(
                f"a cache of {format_bytes(self.num_bytes)} was asked, but its smallest form "
                f"({make(1)[0].label}) takes {format_bytes(needed)}.",
                budget_bytes=self.num_bytes,
                shortfall_bytes=needed - self.num_bytes,
                owners={"kv": needed},
                cheapest_change=f"Allow {format_bytes(needed)}, or take another recipe.",
            )
        low, high = 1, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes_of(make(middle)) <= self.num_bytes else (low, middle - 1)
        return make(low)

    def low_rank(self, heads_together: int, ranks: int, *, per_frequency: bool = False) -> Options:
        """Every head's, or `heads_together` heads', keys and values by as many calibrated directions as fit, of `ranks` steps to all there are; whole where that
        fits. Heads that can't be taken together so stay apart."""
        assert self.statistics is not None
        if self.bytes_of(self.whole) <= self.num_bytes:
            return self.whole

        def at(n: int) -> Options:
            found = []
            for site in self.sites:
                together = heads_together if site.num_kv_heads % heads_together == 0 else 1
                key_rank, value_rank = (
                    max(2, width * together * n // (2 * ranks) * 2)
                    for width in (site.key_head_dim, site.value_head_dim)
                )
                found.append(KVOption(project=LowRankKV(key_rank, value_rank, together)))
            return tuple(found)

        parts = [option.project for option in self.largest(at, ranks)]
        return tuple(
            KVOption(project=channels.fitted(part, per_frequency=per_frequency))
            for channels, part in zip(self.statistics.channels, parts)
            if isinstance(part, LowRankKV)
        )

    def everywhere(self, make: Callable[[int], KVOption]) -> Options:
        """The same option at every layer, as large as fits; `make` takes tokens."""
        return self.largest(lambda n: (make(n),) * len(self.sites), self.most_tokens)

    def shared(self, make: Callable[[int], KVOption], shares: Sequence[float]) -> Options:
        """Layers get tokens in proportion to `shares`, none more than the context."""
        mean = sum(shares) / len(shares)

        def at(n: int) -> Options:
            return tuple(make(min(self.most_tokens, max(1, round(n * share / mean)))) for share in shares)

        return self.largest(at, self.most_tokens * len(self.sites))

    def best_of(self, candidates: Sequence[Options]) -> Options:
        """Of whole caches, the one with the most bytes that fits. Raises DoesNotFitError, as `largest`, where none does."""
        ordered = sorted(candidates, key=self.bytes_of)
        return self.largest(lambda n: ordered[n - 1], len(ordered))


def usual_selections(kind: type[Selection]) -> tuple[KVOption, ...]:
    """What a score that chooses offers to the planner: 192 and 448 tokens for each head, and a block of 64."""
    return tuple(KVOption(score=kind(SINK_TOKENS, tokens, 64, 64)) for tokens in (124, 380))


def selection(kind: type[Selection], num_tokens: int, *, block_tokens: int | None = None, **fields: Any) -> Selection:
    """A selection with about `num_tokens` slots, the block that is being filled included: four sinks, and of the others half the
    most recent, half chosen. If not given, blocks are an eighth of the whole, 4 to 64 tokens; there are at least 16 slots."""
    block = block_tokens or min(MAX_BLOCK_TOKENS, max(4, 1 << (num_tokens.bit_length() - 4)) if num_tokens >= 16 else 4)
    held = max(2 * block, 16 - block, num_tokens - block) // block * block
    recent = (held - SINK_TOKENS) // 2
    return kind(SINK_TOKENS, held - SINK_TOKENS - recent, recent, block, **fields)
