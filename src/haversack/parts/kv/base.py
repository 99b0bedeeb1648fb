"""The whole contract of KV-cache parts, and the option that composes them.

An option is a composition, one part per stage: score -> share -> demote -> represent. *Score* says which tokens a head
holds (none: every token), *share* gives heads and layers different numbers of them (none: the same for all), *demote*
says what happens to a token that is no longer held (none: dropped), *represent* how held tokens are stored. What an
option builds is a `KVLayer`: it owns the bytes of one layer's keys and values, attends to them straight from their
stored form, and never holds more than was declared.

Positions are a sequence's own: token 0 is its first real token. Padding is never stored, so a sequence in a batch holds
the same tokens, in the same groups, as it would alone. Keys are stored after rotary embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from haversack.describe.site import AttentionSite
from haversack.errors import UnsupportedModelError, UsageError
from haversack.ledger import StoredTensor, total_bytes
from haversack.parts.base import Part, part_from_dict

if TYPE_CHECKING:
    import torch

KEY_BLOCK_TOKENS = 1024
"""Stored tokens that attention expands to float32 at a time for few queries (decode): about 100 us of Python each."""

KEY_BLOCK_TOKENS_PREFILL = 256
"""The same for many queries, where the scores, not the keys, fill the workspace."""

QUERY_BLOCK_TOKENS = 512
"""Queries attended at a time: bounds the scores of a whole prefill that nobody cut into chunks."""

FEW_QUERIES = 8
"""Up to this many queries per head, blocks are `KEY_BLOCK_TOKENS` long."""


@dataclass(frozen=True)
class Regions:
    """Which positions a layer holds: the first `sink_tokens`, and the last `recent_tokens` of the others.

    `drops` says whether older tokens are dropped; if not, `sink_tokens + recent_tokens` is the planned capacity and
    growth beyond it is refused. A query at position p attends to held tokens at positions k < sink_tokens or
    k >= p - recent_tokens, whatever the prefill's chunks were.
    """

    sink_tokens: int
    recent_tokens: int
    drops: bool

    @property
    def total_tokens(self) -> int:
        return self.sink_tokens + self.recent_tokens


class KVPart(Part):
    """A part of the KV-cache resident."""

    resident: ClassVar[str] = "kv"


class Score(KVPart):
    """Says which tokens a head holds."""

    stage: ClassVar[str] = "score"

    @abstractmethod
    def regions(self, capacity_tokens: int) -> Regions:
        """The positions held of a sequence of at most `capacity_tokens`."""


class Represent(KVPart):
    """How held tokens are stored."""

    stage: ClassVar[str] = "represent"

    @abstractmethod
    def stored(self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str) -> tuple[StoredTensor, ...]:
        """The tensors this part preallocates for these regions; exact, and all of them."""

    @abstractmethod
    def workspace_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, new_tokens: int, dtype: str
    ) -> int:
        """The most bytes that attending with, and then appending, `new_tokens` allocates beyond the output."""

    @abstractmethod
    def kernel_name(self, site: AttentionSite, regions: Regions, *, dtype: str) -> str:
        """What attends with one new token per sequence on this machine: a compiled kernel, or "blockwise"."""

    @abstractmethod
    def build(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str, device: str | torch.device
    ) -> KVLayer:
        """A layer whose slabs are the declared tensors."""


class KVLayer(ABC):
    """One layer's keys and values: appends, attends, and answers how many bytes it holds and may ever hold.

    `tensors` holds the preallocated slabs by declared name; they are all that the layer keeps beyond a few integers.
    """

    site: AttentionSite
    batch_size: int
    tensors: dict[str, torch.Tensor]

    @abstractmethod
    def append(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Store new tokens: keys and values `(batch, kv_heads, new_tokens, head_dim)`.

        `real` `(batch, new_tokens)` is False where a token is padding (None: nowhere); padding is not stored. Raises
        DoesNotFitError, before anything is written, if a sequence would outgrow the planned capacity.
        """

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        new_keys: torch.Tensor | None = None,
        new_values: torch.Tensor | None = None,
        *,
        scaling: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend to the stored tokens, and causally to new ones that are not stored yet.

        `query` is `(batch, heads, q_tokens, head_dim)`; the queries are the new tokens, or, without new keys, the last
        `q_tokens` stored ones' successors. `sinks` `(heads,)` are learned extra logits that take probability and give no
        value. Returns the output `(batch, heads, q_tokens, head_dim)` in the query's dtype and the log-sum-exp of the
        logits `(batch, heads, q_tokens)` in float32, without the sinks, so that pieces combine. A query that sees no
        token gets zeros and a log-sum-exp of minus infinity.
        """

    @abstractmethod
    def reorder(self, index: torch.Tensor) -> None:
        """Sequence i becomes what sequence `index[i]` was (beams); in place, through a bounded workspace."""

    @abstractmethod
    def resized(self, index: torch.Tensor) -> KVLayer:
        """A new layer whose sequence i is this one's `index[i]`; its batch is `len(index)`."""

    @abstractmethod
    def crop(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` of every sequence; UsageError where earlier ones were dropped for them."""

    @abstractmethod
    def reset(self) -> None:
        """Forget every token; the slabs stay."""

    @abstractmethod
    def seen_tokens(self) -> tuple[int, ...]:
        """Real tokens seen by each sequence, dropped ones included."""

    @abstractmethod
    def held_positions(self, row: int) -> tuple[int, ...]:
        """Positions that sequence `row` can still attend to, ascending."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Everything needed to go on later, as tensors (the slabs themselves, not copies, and the counts)."""

    @abstractmethod
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state()` of a layer of the same shape; UsageError names the first difference."""

    def num_bytes(self) -> int:
        """Bytes held now, on distinct storages."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors.values()}
        return sum(storages.values())

    @abstractmethod
    def max_bytes(self) -> int:
        """Bytes this layer may ever hold: the sum of its declared tensors."""


def _plain() -> Represent:
    from haversack.parts.kv.plain import PlainKV

    return PlainKV()


@dataclass(frozen=True)
class KVOption:
    """A composition of parts at an attention site. The default is *neutral*: the model's dtype, every token."""

    score: Score | None = None
    represent: Represent = field(default_factory=_plain)

    @property
    def parts(self) -> tuple[KVPart, ...]:
        return (self.represent,) if self.score is None else (self.score, self.represent)

    @property
    def is_neutral(self) -> bool:
        return self.score is None and self.represent.lossless

    @property
    def label(self) -> str:
        """A few words for tables, unique among options."""
        return " + ".join(part.label for part in self.parts)

    def regions(self, site: AttentionSite, capacity_tokens: int) -> Regions:
        """What is held at this site. A native sliding window of W never needs more than the last W - 1 tokens.

        There the model itself looks at no token further back, so attention sinks are not held either.
        Raises UnsupportedModelError where attention can't be reached through this site.
        """
        if capacity_tokens < 1:
            raise UsageError(f"a cache for {capacity_tokens} tokens was asked; it must hold at least 1.")
        if site.shares_with is not None or site.chunk_tokens is not None:
            why = "reuses another layer's keys and values" if site.shares_with is not None else "attends in chunks"
            raise UnsupportedModelError(f"{site.id} {why}; its cache can't be planned, only left to transformers.")
        held = Regions(0, capacity_tokens, drops=False) if self.score is None else self.score.regions(capacity_tokens)
        if site.window_tokens is None:
            return held
        window = max(1, site.window_tokens - 1)
        if held.drops:
            return Regions(0, min(held.recent_tokens, window), drops=True)
        return Regions(0, min(capacity_tokens, window), drops=window < capacity_tokens)

    def stored(
        self, site: AttentionSite, *, batch_size: int, capacity_tokens: int, dtype: str
    ) -> tuple[StoredTensor, ...]:
        """Declared tensors for `batch_size` sequences of at most `capacity_tokens` each."""
        return self.represent.stored(site, self.regions(site, capacity_tokens), batch_size=batch_size, dtype=dtype)

    def stored_bytes(self, site: AttentionSite, *, batch_size: int, capacity_tokens: int, dtype: str) -> int:
        return total_bytes(self.stored(site, batch_size=batch_size, capacity_tokens=capacity_tokens, dtype=dtype))

    def workspace_bytes(
        self, site: AttentionSite, *, batch_size: int, capacity_tokens: int, new_tokens: int, dtype: str
    ) -> int:
        """The most bytes one attend and append of `new_tokens` per sequence allocates, the output excluded."""
        regions = self.regions(site, capacity_tokens)
        return self.represent.workspace_bytes(site, regions, batch_size=batch_size, new_tokens=new_tokens, dtype=dtype)

    def kernel_name(self, site: AttentionSite, *, capacity_tokens: int, dtype: str) -> str:
        """What attends with one new token per sequence on this machine."""
        return self.represent.kernel_name(site, self.regions(site, capacity_tokens), dtype=dtype)

    def build(
        self,
        site: AttentionSite,
        *,
        batch_size: int,
        capacity_tokens: int,
        dtype: str,
        device: str | torch.device = "cpu",
    ) -> KVLayer:
        """An empty layer; its slabs equal `stored` to the byte."""
        regions = self.regions(site, capacity_tokens)
        return self.represent.build(site, regions, batch_size=batch_size, dtype=dtype, device=device)

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"represent": self.represent.to_dict()}
        if self.score is not None:
            data["score"] = self.score.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KVOption:
        score = part_from_dict(data["score"]) if "score" in data else None
        represent = part_from_dict(data["represent"]) if "represent" in data else _plain()
        return cls(score=score, represent=represent)  # type: ignore[arg-type]
