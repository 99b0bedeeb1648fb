"""The whole contract of KV-cache parts, and the option that composes them.

An option is a composition, one part per stage: project -> score -> share -> demote -> represent. *Project* says which
channels, or sums of them, stand for a head's (none: its own), *score* which tokens a head holds (none: every token),
*share* gives heads and layers different numbers of them (none: the same for all), *demote* says what happens to a token
that is no longer held (none: dropped), *represent* how held tokens are stored. What an option builds is a `KVLayer`: it
owns the bytes of one layer's keys and values, attends to them straight from their stored form, and never holds more than
was declared.

Positions are a sequence's own: token 0 is its first real token. Padding is never stored, so a sequence in a batch holds
the same tokens, in the same groups, as it would alone. Keys are stored after rotary embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from haversack.describe.site import AttentionSite
from haversack.errors import DoesNotFitError, UnsupportedModelError, UsageError
from haversack.ledger import StoredTensor, total_bytes
from haversack.parts.base import Part, check_range, part_from_dict
from haversack.parts.kv.slabs import allocate, selection_slabs

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
    """Which positions a layer holds: the first `sink_tokens`, the last `recent_tokens`, and `selected_tokens` that each KV head chooses between.

    `drops` says whether older tokens are dropped; if not, the total is the planned capacity and growth beyond it is refused. Without selected tokens, a query at
    position p attends to held tokens at positions k < sink_tokens or k >= p - recent_tokens, whatever the prefill's chunks were. With them, tokens are freed when another
    block of `block_tokens` positions begins, and until then a block more is held. Up to `demoted_tokens` freed ones are held in another form.
    """

    sink_tokens: int
    recent_tokens: int
    drops: bool
    selected_tokens: int = 0
    block_tokens: int = 0
    demoted_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.sink_tokens + self.selected_tokens + self.recent_tokens

    @property
    def slot_tokens(self) -> int:
        """Tokens that there is room for, the block that is being filled included."""
        return self.total_tokens + self.block_tokens


class KVPart(Part):
    """A part of the KV-cache resident."""

    resident: ClassVar[str] = "kv"


class Score(KVPart):
    """Says which tokens a head holds."""

    stage: ClassVar[str] = "score"

    @abstractmethod
    def regions(self, capacity_tokens: int) -> Regions:
        """The positions held of a sequence of at most `capacity_tokens`."""


@dataclass(frozen=True)
class Selection(Score):
    """Each KV head keeps the tokens that its attention says matter: `selected_tokens` of them, besides sinks and the recent ones.

    Bytes: those of `sink_tokens + selected_tokens + recent_tokens + block_tokens` tokens at any length, and 8 more per token and KV head for its position and its
    importance. Error: what is freed is lost; none for sequences no longer than what is held. Queries of a group share their head's choice. Importance comes from
    probabilities that are made a block at a time from the log-sum-exp: the attention matrix never exists.
    """

    memory: ClassVar[float] = 1.0
    """What is left of a token's importance when the next block of positions begins."""
    weighed: ClassVar[bool] = False
    """Whether tokens get their importance from outside (`KVLayer.weigh`), as the model's own surprise at them."""

    sink_tokens: int = 4
    selected_tokens: int = 188
    recent_tokens: int = 64
    block_tokens: int = 64

    def __post_init__(self) -> None:
        check_range(self.id, "sink_tokens", self.sink_tokens, "0 or more", self.sink_tokens >= 0)
        check_range(self.id, "selected_tokens", self.selected_tokens, "1 or more", self.selected_tokens >= 1)
        check_range(self.id, "recent_tokens", self.recent_tokens, "0 or more", self.recent_tokens >= 0)
        check_range(self.id, "block_tokens", self.block_tokens, "1 or more", self.block_tokens >= 1)
        total = self.held_tokens
        whole = f"such that sinks, selected and recent tokens ({total}) are whole blocks of {self.block_tokens}"
        check_range(self.id, "selected_tokens", self.selected_tokens, whole, total % self.block_tokens == 0)

    @property
    def held_tokens(self) -> int:
        return self.sink_tokens + self.selected_tokens + self.recent_tokens

    @property
    def label(self) -> str:
        return f"{self.name} {self.sink_tokens}+{self.selected_tokens}+{self.recent_tokens}"

    name: ClassVar[str]
    """A word for tables."""

    def regions(self, capacity_tokens: int) -> Regions:
        if capacity_tokens <= self.held_tokens + self.block_tokens:
            return Regions(0, capacity_tokens, drops=False)
        return Regions(self.sink_tokens, self.recent_tokens, True, self.selected_tokens, self.block_tokens)

    @abstractmethod
    def received(self, probabilities: torch.Tensor, *, held_tokens: int) -> torch.Tensor:
        """Importance that queries give to tokens: `(batch, kv_heads, groups, queries, tokens)` to `(batch, kv_heads, tokens)`.

        `held_tokens` is how many tokens the queries share their attention between. The probabilities may be overwritten; a copy of them would be
        workspace that nobody declared.
        """

    reads_values: ClassVar[bool] = False
    """Whether `priority` is given the held tokens' values, which takes a copy of them in float32."""

    def priority(
        self,
        importance: torch.Tensor,
        positions: torch.Tensor,
        counts: torch.Tensor,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What tokens are kept by, all `(batch, kv_heads, tokens)`; `counts` `(batch, 1, 1)` is the sequence's length, `values` `(batch, kv_heads, tokens, head_dim)`."""
        return importance.clone()


class Represent(KVPart):
    """How held tokens are stored."""

    stage: ClassVar[str] = "represent"
    spares_steps: ClassVar[bool] = False
    """Whether steps of few tokens read less of the cache than a prompt's chunk does, so that only steps show what is lost."""

    @property
    def joins(self) -> bool:
        """Whether the layer is stored with the one before it, whose option `check_joined` looks at; it must `join` that layer before it holds anything."""
        return False

    def check_joined(self, before: KVOption | None) -> None:
        """Raise PlanError unless a layer of this form can be stored with the one `before`."""

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

    def link_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, held_tokens: int, dtype: str
    ) -> int:
        """The most bytes that a step of one token, with `held_tokens` before it, moves from another tier or to it; new tokens that are put away there included."""
        return 0

    def read_there_bytes(self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str) -> int:
        """The most bytes of a full cache that another tier reads by itself per step, where it attends to what it holds."""
        return 0

    def stored_slots(
        self, site: AttentionSite, num_slots: int, *, batch_size: int, dtype: str
    ) -> tuple[StoredTensor, ...]:
        """The tensors of `num_slots` slots that each hold one token of each KV head. Raises UsageError where tokens are stored in groups."""
        raise UsageError(f"{self.id} stores tokens in groups, so heads can't choose between them.")

    def slots(self, tensors: dict[str, torch.Tensor], site: AttentionSite) -> Slots:
        """Slots in tensors as `stored_slots` declares them."""
        raise UsageError(f"{self.id} stores tokens in groups, so heads can't choose between them.")


class Project(KVPart):
    """Which channels, or sums of channels, are stored in the place of a head's, or of several heads'; everything behind sees heads of another width.

    Projections are linear and the same for every token, so that a query that is projected once meets all stored keys.
    """

    stage: ClassVar[str] = "project"

    @abstractmethod
    def inside(self, site: AttentionSite) -> AttentionSite:
        """The site as what stores it sees it. Raises UsageError where this part was made for other heads."""

    @abstractmethod
    def stored(self, site: AttentionSite) -> tuple[StoredTensor, ...]:
        """The tensors that hold the projection itself, whatever the batch."""

    @abstractmethod
    def build(self, site: AttentionSite, device: str | torch.device) -> Projection:
        """The projection, whose tensors are the declared ones."""


class Projection(ABC):
    """What `Project.build` makes. Inputs are `(batch, heads, tokens, head_dim)`; each method allocates at most twice its input in float32, and its result."""

    tensors: dict[str, torch.Tensor]

    @abstractmethod
    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Queries as they meet the stored keys."""

    @abstractmethod
    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """Keys as they are stored."""

    @abstractmethod
    def values(self, x: torch.Tensor) -> torch.Tensor:
        """Values as they are stored."""

    @abstractmethod
    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Sums of stored values `(batch, heads, tokens, inside value_head_dim)` as sums of values."""


class Demote(KVPart):
    """What becomes of tokens that no head chooses; without such a part they are dropped.

    They are held in a store of their own (`demoted_tokens`, `stored`, `store`), or leave something in the tokens that are kept (`merge`).
    """

    stage: ClassVar[str] = "demote"
    merges: ClassVar[bool] = False
    """Whether freed tokens change the kept ones, which must then be in the model's dtype: packed ones would be packed again and again."""

    def demoted_tokens(self, regions: Regions, capacity_tokens: int) -> int:
        """How many freed tokens of a sequence of at most `capacity_tokens` are held."""
        return 0

    def stored(self, site: AttentionSite, regions: Regions, *, batch_size: int) -> tuple[StoredTensor, ...]:
        """The tensors that hold demoted tokens, whole blocks of them."""
        return ()

    def store(self, site: AttentionSite, regions: Regions, tensors: dict[str, torch.Tensor]) -> PackedGroups | None:
        """The store in those tensors: groups of `regions.block_tokens` tokens, each head's own."""
        return None

    def merge(
        self,
        kept: tuple[torch.Tensor, torch.Tensor],
        freed: tuple[torch.Tensor, torch.Tensor],
        open_to: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor],
        importance: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept keys and values `(rows, kv_heads, tokens, head_dim)` with what freed ones leave in those that are `open_to` it; float32. `positions` and `importance` are theirs, `(rows, kv_heads, tokens)`."""
        raise UsageError(f"{self.id} leaves kept tokens as they are.")


class PackedGroups(ABC):
    """A ring of groups of tokens in a packed form: writes whole groups, reads whole groups in float32."""

    group_tokens: int
    num_groups: int
    tensors: dict[str, torch.Tensor]
    code_bits: tuple[int, int] | None = None
    """Bits of keys and values, where the groups lie in layout `kv-tokens-v1`, which compiled attention reads."""

    @abstractmethod
    def write(self, rows: slice, first_slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Pack `(rows, kv_heads, n * group_tokens, head_dim)` into group slots `first_slot ... first_slot + n - 1`."""

    @abstractmethod
    def read(self, first_slot: int, last_slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in float32 of the group slots `[first_slot, last_slot)` of every row."""


class Slots(ABC):
    """Room for tokens of every KV head that is written in order and moved one by one."""

    @abstractmethod
    def write(self, rows: slice, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store `(rows, kv_heads, n, head_dim)` in slots `first ... first + n - 1`."""

    @abstractmethod
    def read(self, rows: slice, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of slots `[first, last)` in float32."""

    def as_stored(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """New tokens as they will be read once they are stored: queries see no other form of them, so that chunks decide nothing."""
        return keys, values

    def replace(self, rows: slice, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store other keys and values in `slots` `(rows, kv_heads, n)`, where tokens are in the model's dtype."""
        raise UsageError("packed slots are written once.")

    @abstractmethod
    def movable(self) -> tuple[torch.Tensor, ...]:
        """Tensors `(batch, kv_heads, slots, ...)` in which a token moves when its slot does."""


@dataclass(frozen=True)
class Attending:
    """How queries attend: logits are scaled, then capped, and share their softmax with learned `sinks` `(heads,)`, which take
    probability and give no value. `real` `(batch, new_tokens)` is False where a new token is padding (None: nowhere)."""

    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    real: torch.Tensor | None = None


class KVLayer(ABC):
    """One layer's keys and values: appends, attends, and answers how many bytes it holds and may ever hold.

    `tensors` holds the preallocated slabs by declared name; they are all that the layer keeps beyond a few integers.
    """

    site: AttentionSite
    batch_size: int
    tensors: dict[str, torch.Tensor]

    @property
    def elsewhere(self) -> dict[str, str]:
        """The tier of every tensor that does not lie on the device, by name."""
        return {}

    @abstractmethod
    def append(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Store new tokens: keys and values `(batch, kv_heads, new_tokens, head_dim)`.

        `real` `(batch, new_tokens)` is False where a token is padding (None: nowhere); padding is not stored. Raises
        DoesNotFitError, before anything is written, if a sequence would outgrow the planned capacity.
        """

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
        `q_tokens` stored ones' successors. See `Attending` for the rest. Returns the output `(batch, heads, q_tokens,
        head_dim)` in the query's dtype and the log-sum-exp of the logits `(batch, heads, q_tokens)` in float32, without
        the sinks, so that pieces combine. A query that sees no token gets zeros and a log-sum-exp of minus infinity.
        """
        return self._attend(query, new_keys, new_values, Attending(scaling, softcap, sinks, real))

    def step(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend to what is stored and, causally, to the new tokens; then store those. Arguments and results as `attend`'s."""
        return self._step(query, keys, values, Attending(scaling, softcap, sinks, real))

    def peek(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend as `step` does and store nothing; a layer that chooses between tokens learns from it which ones matter."""
        return self._peek(query, keys, values, Attending(scaling, softcap, sinks, real))

    def weigh(self, weights: torch.Tensor) -> None:
        """Say what the last `n` tokens of every sequence are worth, float32 `(batch, n)`; for layers whose score asks for it."""
        return

    @abstractmethod
    def _attend(
        self, query: torch.Tensor, new_keys: torch.Tensor | None, new_values: torch.Tensor | None, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `attend` does."""

    def _peek(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `peek` does."""
        return self._attend(query, keys, values, how)

    def _step(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `step` does; layers that choose between tokens attend and store in turns."""
        result = self._attend(query, keys, values, how)
        self.append(keys, values, how.real)
        return result

    def join(self, before: KVLayer) -> None:
        """Share what is stored with the layer before; UsageError where there is nothing to share."""
        raise UsageError(f"{self.site.id} shares nothing with {before.site.id}.")

    @abstractmethod
    def reorder(self, index: torch.Tensor) -> None:
        """Sequence i becomes what sequence `index[i]` was (beams); in place, through a bounded workspace."""

    @abstractmethod
    def resized(self, index: torch.Tensor) -> KVLayer:
        """A new layer whose sequence i is this one's `index[i]`; its batch is `len(index)`."""

    def crop(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` of every sequence; UsageError where earlier ones were dropped for them."""
        if num_tokens:
            self.check_crop(num_tokens)
            self._forget(num_tokens)

    @abstractmethod
    def check_crop(self, num_tokens: int) -> None:
        """Raise UsageError unless the last `num_tokens` can be forgotten."""

    @abstractmethod
    def _forget(self, num_tokens: int) -> None:
        """What `crop` does once it was checked."""

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

    def num_bytes(self, tier: str = "device") -> int:
        """Bytes held now on a tier, on distinct storages."""
        there = [t for name, t in self.tensors.items() if self.elsewhere.get(name, "device") == tier]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in there}.values())

    @abstractmethod
    def max_bytes(self) -> int:
        """Bytes this layer may ever hold on the device: the sum of the tensors declared there."""


def check_room(site: AttentionSite, longest_tokens: int, room_tokens: int) -> None:
    """Raise DoesNotFitError where a sequence would outgrow the tokens that a layer was planned for."""
    if longest_tokens > room_tokens:
        raise DoesNotFitError(
            f"{site.id}: a sequence of {longest_tokens} tokens was asked of a cache planned for {room_tokens}; plan a longer "
            "context, or options that drop old tokens.",
            cheapest_change=f"plan a context of {longest_tokens} tokens",
        )


def _plain() -> Represent:
    from haversack.parts.kv.plain import PlainKV

    return PlainKV()


@dataclass(frozen=True)
class KVOption:
    """A composition of parts at an attention site. The default is *neutral*: the model's dtype, every token.

    With `heads`, one option per KV head, the layer is ragged: heads of one option lie together in a layer of their own
    (`parts.kv.bands`), and the other fields stay as they are by default. `by_head` makes such an option.
    """

    score: Score | None = None
    represent: Represent = field(default_factory=_plain)
    demote: Demote | None = None
    heads: tuple[KVOption, ...] = ()
    project: Project | None = None

    def __post_init__(self) -> None:
        if self.heads and (self.score or self.demote or self.project or any(option.heads for option in self.heads)):
            raise UsageError("an option by heads holds nothing but one plain option per KV head.")
        if self.demote is not None and self.demote.merges and not self.represent.lossless:
            raise UsageError(f"{self.demote.id} changes kept tokens, so they can't be stored by {self.represent.id}.")
        if any(option.represent.joins for option in self.heads):
            raise UsageError("a layer that shares its store with another has one option for all heads.")

    @property
    def parts(self) -> tuple[KVPart, ...]:
        if self.heads:
            return tuple(dict.fromkeys(part for option in self.heads for part in option.parts))
        return tuple(part for part in (self.project, self.score, self.demote, self.represent) if part is not None)

    @property
    def is_neutral(self) -> bool:
        return not self.heads and self.project is None and self.score is None and self.represent.lossless

    @property
    def unprojected(self) -> KVOption:
        """What stores the projected heads."""
        return replace(self, project=None)

    @property
    def label(self) -> str:
        """A few words for tables, unique among options."""
        if self.heads:
            return "; ".join(f"{heads}: {option.label}" for option, heads in _named_bands(self.heads))
        return " + ".join(part.label for part in self.parts)

    def bands(self, site: AttentionSite) -> tuple[Band, ...]:
        """Heads of one option together, as sites of their own; those that drop nothing first, for they refuse what is too long."""
        if len(self.heads) != site.num_kv_heads:
            raise UsageError(f"{site.id} has {site.num_kv_heads} KV heads, but the option is for {len(self.heads)}.")
        groups = site.num_heads // site.num_kv_heads
        found = []
        for option in dict.fromkeys(sorted(self.heads, key=lambda option: option.score is not None)):
            heads = tuple(head for head, its in enumerate(self.heads) if its == option)
            part = replace(site, num_heads=groups * len(heads), num_kv_heads=len(heads))
            found.append(Band(f"heads-{'-'.join(map(str, heads))}", heads, part, option))
        return tuple(found)

    def regions(self, site: AttentionSite, capacity_tokens: int) -> Regions:
        """What is held at this site. A native sliding window of W never needs more than the last W - 1 tokens.

        There the model itself looks at no token further back, so attention sinks and chosen tokens are not held either.
        Raises UnsupportedModelError where attention can't be reached through this site.
        """
        if capacity_tokens < 1:
            raise UsageError(f"a cache for {capacity_tokens} tokens was asked; it must hold at least 1.")
        if site.shares_with is not None or site.chunk_tokens is not None:
            why = "reuses another layer's keys and values" if site.shares_with is not None else "attends in chunks"
            raise UnsupportedModelError(f"{site.id} {why}; its cache can't be planned, only left to transformers.")
        held = Regions(0, capacity_tokens, drops=False) if self.score is None else self.score.regions(capacity_tokens)
        if site.window_tokens is None:
            if self.demote is not None and held.selected_tokens:
                return replace(held, demoted_tokens=self.demote.demoted_tokens(held, capacity_tokens))
            return held
        window = max(1, site.window_tokens - 1)
        if held.drops and not held.selected_tokens:
            return Regions(0, min(held.recent_tokens, window), drops=True)
        return Regions(0, min(capacity_tokens, window), drops=window < capacity_tokens)

    def stored(
        self, site: AttentionSite, *, batch_size: int, capacity_tokens: int, dtype: str
    ) -> tuple[StoredTensor, ...]:
        """Declared tensors for `batch_size` sequences of at most `capacity_tokens` each."""
        if self.heads:
            sizes = {"batch_size": batch_size, "capacity_tokens": capacity_tokens, "dtype": dtype}
            return tuple(
                tensor.prefixed(band.name)
                for band in self.bands(site)
                for tensor in band.option.stored(band.site, **sizes)  # type: ignore[arg-type]
            )
        if self.project is not None:
            sizes = {"batch_size": batch_size, "capacity_tokens": capacity_tokens, "dtype": dtype}
            inside = self.unprojected.stored(self.project.inside(site), **sizes)  # type: ignore[arg-type]
            return (*inside, *(tensor.prefixed("projection") for tensor in self.project.stored(site)))
        regions = self.regions(site, capacity_tokens)
        if not regions.selected_tokens:
            return self.represent.stored(site, regions, batch_size=batch_size, dtype=dtype)
        slots = self.represent.stored_slots(site, regions.slot_tokens, batch_size=batch_size, dtype=dtype)
        demoted = self.demote.stored(site, regions, batch_size=batch_size) if self.demote else ()
        return (*slots, *selection_slabs(site, batch_size, regions.slot_tokens), *demoted)

    def stored_bytes(
        self, site: AttentionSite, *, batch_size: int, capacity_tokens: int, dtype: str, tier: str = "device"
    ) -> int:
        """Declared bytes on a tier."""
        declared = self.stored(site, batch_size=batch_size, capacity_tokens=capacity_tokens, dtype=dtype)
        return total_bytes(declared, tier)

    def workspace_bytes(
        self, site: AttentionSite, *, batch_size: int, capacity_tokens: int, new_tokens: int, dtype: str
    ) -> int:
        """The most bytes one attend and append of `new_tokens` per sequence allocates, the output excluded."""
        if self.heads:
            from haversack.parts.kv.bands import bands_workspace_bytes

            shape = {"batch_size": batch_size, "new_tokens": new_tokens, "dtype": dtype}
            return bands_workspace_bytes(site, self.bands(site), capacity_tokens=capacity_tokens, **shape)  # type: ignore[arg-type]
        if self.project is not None:
            from haversack.parts.kv.projected import projection_workspace_bytes

            inside, shape = (
                self.project.inside(site),
                {"batch_size": batch_size, "new_tokens": new_tokens, "dtype": dtype},
            )
            within = self.unprojected.workspace_bytes(inside, capacity_tokens=capacity_tokens, **shape)  # type: ignore[arg-type]
            return within + projection_workspace_bytes(site, inside, **shape)  # type: ignore[arg-type]
        regions = self.regions(site, capacity_tokens)
        sizes = {"batch_size": batch_size, "new_tokens": new_tokens, "dtype": dtype}
        if regions.selected_tokens:
            from haversack.parts.kv.selective import selection_workspace_bytes

            packed, merges = not self.represent.lossless, self.demote is not None and self.demote.merges
            reads = isinstance(self.score, Selection) and self.score.reads_values
            return selection_workspace_bytes(site, regions, packed=packed, merges=merges, reads_values=reads, **sizes)  # type: ignore[arg-type]
        return self.represent.workspace_bytes(site, regions, **sizes)  # type: ignore[arg-type]

    def link_bytes(self, site: AttentionSite, *, batch_size: int, capacity_tokens: int, dtype: str) -> int:
        """The most bytes that one step with a full cache moves from another tier or to it."""
        sizes = {"batch_size": batch_size, "capacity_tokens": capacity_tokens, "dtype": dtype}
        if self.heads:
            return sum(band.option.link_bytes(band.site, **sizes) for band in self.bands(site))  # type: ignore[arg-type, misc]
        if self.project is not None:
            return self.unprojected.link_bytes(self.project.inside(site), **sizes)  # type: ignore[arg-type]
        regions = self.regions(site, capacity_tokens)
        return self.represent.link_bytes(
            site, regions, batch_size=batch_size, held_tokens=regions.total_tokens, dtype=dtype
        )

    def read_there_bytes(self, site: AttentionSite, *, batch_size: int, capacity_tokens: int, dtype: str) -> int:
        """The most bytes that another tier reads by itself in one step with a full cache."""
        sizes = {"batch_size": batch_size, "capacity_tokens": capacity_tokens, "dtype": dtype}
        if self.heads:
            return sum(band.option.read_there_bytes(band.site, **sizes) for band in self.bands(site))  # type: ignore[arg-type, misc]
        if self.project is not None:
            return self.unprojected.read_there_bytes(self.project.inside(site), **sizes)  # type: ignore[arg-type]
        regions = self.regions(site, capacity_tokens)
        return self.represent.read_there_bytes(site, regions, batch_size=batch_size, dtype=dtype)

    def kernel_name(self, site: AttentionSite, *, capacity_tokens: int, dtype: str) -> str:
        """What attends with one new token per sequence on this machine."""
        if self.heads:
            bands = self.bands(site)
            names = [b.option.kernel_name(b.site, capacity_tokens=capacity_tokens, dtype=dtype) for b in bands]
            return " and ".join(dict.fromkeys(names))
        if self.project is not None:
            return self.unprojected.kernel_name(self.project.inside(site), capacity_tokens=capacity_tokens, dtype=dtype)
        from haversack.parts.kv.attention import BLOCKWISE

        regions = self.regions(site, capacity_tokens)
        return BLOCKWISE if regions.selected_tokens else self.represent.kernel_name(site, regions, dtype=dtype)

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
        if self.heads:
            from haversack.parts.kv.bands import BandedLayer

            sizes = {"batch_size": batch_size, "capacity_tokens": capacity_tokens, "dtype": dtype, "device": device}
            bands = self.bands(site)
            return BandedLayer(site, bands, [band.option.build(band.site, **sizes) for band in bands])  # type: ignore[arg-type]
        if self.project is not None:
            from haversack.parts.kv.projected import ProjectedLayer

            sizes = {"batch_size": batch_size, "capacity_tokens": capacity_tokens, "dtype": dtype, "device": device}
            store = self.unprojected.build(self.project.inside(site), **sizes)  # type: ignore[arg-type]
            return ProjectedLayer(site, self.project.build(site, device), store)
        regions = self.regions(site, capacity_tokens)
        if not regions.selected_tokens:
            return self.represent.build(site, regions, batch_size=batch_size, dtype=dtype, device=device)
        from haversack.parts.kv.selective import SelectiveLayer

        assert isinstance(self.score, Selection)
        declared = self.stored(site, batch_size=batch_size, capacity_tokens=capacity_tokens, dtype=dtype)
        tensors = allocate(declared, device)
        return SelectiveLayer(
            site,
            regions,
            self.score,
            self.represent.slots(tensors, site),
            batch_size=batch_size,
            declared=declared,
            tensors=tensors,
            rebuild=lambda rows: self.build(
                site, batch_size=rows, capacity_tokens=capacity_tokens, dtype=dtype, device=device
            ),
            demote=self.demote,
        )

    def to_dict(self) -> dict[str, Any]:
        if self.heads:
            return {"heads": [option.to_dict() for option in self.heads]}
        stages = (
            ("project", self.project), ("score", self.score), ("demote", self.demote), ("represent", self.represent),
        )  # fmt: skip
        return {stage: part.to_dict() for stage, part in stages if part is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KVOption:
        if "heads" in data:
            return cls(heads=tuple(cls.from_dict(option) for option in data["heads"]))
        parts = {
            stage: part_from_dict(data[stage]) for stage in ("project", "score", "represent", "demote") if stage in data
        }
        return cls(**parts)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Band:
    """KV heads of one layer that have one option: `site` is the layer's, cut to them."""

    name: str
    heads: tuple[int, ...]
    site: AttentionSite
    option: KVOption


def by_head(options: Sequence[KVOption]) -> KVOption:
    """One option per KV head; where all are equal, that option."""
    return options[0] if len(set(options)) == 1 else KVOption(heads=tuple(options))


def _named_bands(options: Sequence[KVOption]) -> list[tuple[KVOption, str]]:
    """Distinct options and the heads that have them, as text."""
    distinct = dict.fromkeys(options)
    return [(one, "heads " + ",".join(str(i) for i, o in enumerate(options) if o == one)) for one in distinct]
