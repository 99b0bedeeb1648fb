"""A shared prefix: what all sequences of a batch begin with is stored once, and attended to by all their queries together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.errors import UsageError
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.base import Source, check_range
from haversack.parts.kv.base import Attending, KVLayer, Regions, Represent, check_room
from haversack.parts.kv.layer import RingLayer
from haversack.parts.kv.plain import PlainKV

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SharedPrefixKV(Represent):
    """Store the first `prefix_tokens` real tokens of a batch's sequences, which must be the same in all, once, in the model's dtype; what follows as it is.

    Bytes: those of `prefix_tokens + batch_size * (capacity - prefix_tokens)` tokens. Error: none; queries of all sequences meet the prefix's keys in one product, and the two
    softmaxes are put together by their log-sum-exps, so that sums are rounded in another order. The prefix is stored as it is read, from whichever row comes
    first. Where older tokens are dropped, or the context is no longer than the prefix, everything is stored as `kv.plain` does. Differs from the source in that there
    is one level of sharing, where the source has trees.
    """

    id: ClassVar[str] = "kv.shared-prefix"
    title: ClassVar[str] = "What all sequences of a batch begin with, once"
    source: ClassVar[Source | None] = Source(
        "Juravsky et al.", 2024, "Hydragen: High-Throughput LLM Inference with Shared Prefixes", "2402.05099", "section 3"
    )  # fmt: skip

    prefix_tokens: int = 128

    def __post_init__(self) -> None:
        check_range(self.id, "prefix_tokens", self.prefix_tokens, "1 or more", self.prefix_tokens >= 1)

    @property
    def label(self) -> str:
        return f"the first {self.prefix_tokens} tokens once for all sequences"

    def _parts(self, regions: Regions) -> tuple[Regions, Regions] | None:
        """Regions of the prefix and of what follows; None where nothing is shared."""
        if regions.drops or regions.total_tokens <= self.prefix_tokens:
            return None
        return replace(regions, recent_tokens=self.prefix_tokens), replace(
            regions, recent_tokens=regions.recent_tokens - self.prefix_tokens
        )

    def stored(self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str) -> tuple[StoredTensor, ...]:
        parts = self._parts(regions)
        if parts is None:
            return PlainKV().stored(site, regions, batch_size=batch_size, dtype=dtype)
        prefix = PlainKV().stored(site, parts[0], batch_size=1, dtype=dtype)
        rest = PlainKV().stored(site, parts[1], batch_size=batch_size, dtype=dtype)
        return (*(tensor.prefixed("prefix") for tensor in prefix), *rest)

    def workspace_bytes(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, new_tokens: int, dtype: str
    ) -> int:
        """Both halves' results, the queries laid out for the prefix, and the larger of what attending to either takes; or one row's prefix."""
        parts = self._parts(regions)
        sizes = {"batch_size": batch_size, "new_tokens": new_tokens, "dtype": dtype}
        if parts is None:
            return PlainKV().workspace_bytes(site, regions, **sizes)  # type: ignore[arg-type]
        together = PlainKV().workspace_bytes(
            site, parts[0], batch_size=1, new_tokens=max(2, batch_size * new_tokens), dtype=dtype
        )
        own = PlainKV().workspace_bytes(
            site, parts[1], batch_size=batch_size, new_tokens=max(2, new_tokens), dtype=dtype
        )
        f32, rows = DTYPE_BYTES["F32"], batch_size * new_tokens * site.num_heads
        results = rows * (site.key_head_dim * f32 + 4 * site.value_head_dim * f32 + 6 * f32)
        return results + 16 * batch_size * new_tokens + max(together, own)

    def kernel_name(self, site: AttentionSite, regions: Regions, *, dtype: str) -> str:
        parts = self._parts(regions)
        return PlainKV().kernel_name(site, regions if parts is None else parts[1], dtype=dtype)

    def build(
        self, site: AttentionSite, regions: Regions, *, batch_size: int, dtype: str, device: str | torch.device
    ) -> KVLayer:
        parts = self._parts(regions)
        sizes = {"dtype": dtype, "device": device}
        if parts is None:
            return PlainKV().build(site, regions, batch_size=batch_size, **sizes)  # type: ignore[arg-type]
        prefix = PlainKV().build(site, parts[0], batch_size=1, **sizes)  # type: ignore[arg-type]
        rest = PlainKV().build(site, parts[1], batch_size=batch_size, **sizes)  # type: ignore[arg-type]
        assert isinstance(prefix, RingLayer) and isinstance(rest, RingLayer)
        return SharedPrefixLayer(site, self.prefix_tokens, prefix, rest)


class SharedPrefixLayer(KVLayer):
    """`prefix` has one row for all sequences, `rest` one for each; `begun` says how much of the prefix each has read."""

    def __init__(self, site: AttentionSite, prefix_tokens: int, prefix: RingLayer, rest: RingLayer):
        self.site = site
        self.prefix_tokens = prefix_tokens
        self.prefix = prefix
        self.rest = rest
        self.batch_size = rest.batch_size
        self.begun = [0] * self.batch_size
        self.tensors = {**{f"prefix.{name}": t for name, t in prefix.tensors.items()}, **rest.tensors}

    def max_bytes(self) -> int:
        return self.prefix.max_bytes() + self.rest.max_bytes()

    def seen_tokens(self) -> tuple[int, ...]:
        return tuple(begun + own for begun, own in zip(self.begun, self.rest.seen_tokens()))

    def held_positions(self, row: int) -> tuple[int, ...]:
        return tuple(range(self.seen_tokens()[row]))

    # Growing and attending

    def append(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None = None) -> None:
        own = self._own(keys.shape[2], real)
        for row, columns in self._prefix_pieces(keys, values, own, real):
            self._read_on(row, keys[row : row + 1, :, columns], values[row : row + 1, :, columns])
        self.rest.append(keys, values, None if bool(own.all()) else own)
        self._note(own, real)

    def _attend(
        self, query: torch.Tensor, new_keys: torch.Tensor | None, new_values: torch.Tensor | None, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if any(begun < self.prefix_tokens for begun in self.begun):
            raise UsageError(
                f"{self.site.id}: the shared prefix is not read yet; tokens must be attended and stored in one step."
            )
        plain = replace(how, sinks=None)
        return self._merged(query, self.rest._attend(query, new_keys, new_values, plain), how)

    def _step(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        own = self._own(keys.shape[2], how.real)
        pieces = list(self._prefix_pieces(keys, values, own, how.real))
        shape = (query.shape[0], query.shape[2], query.shape[1], values.shape[-1])
        output = query.new_zeros(shape).transpose(1, 2)
        lse = torch.full(query.shape[:3], -torch.inf, device=query.device)
        for row, columns in pieces:
            part = (slice(row, row + 1), slice(None), columns)
            self.prefix.counts = [self.begun[row]]
            output[part], lse[part] = self.prefix._attend(
                query[part], keys[part], values[part], replace(how, real=None)
            )
            self._read_on(row, keys[part], values[part])
        if bool(own.any()):
            rest = self.rest._step(query, keys, values, replace(how, sinks=None, real=None if bool(own.all()) else own))
            self._note(own, how.real)
            found, found_lse = self._merged(query, rest, how)
            output.copy_(torch.where(own[:, None, :, None], found, output))
            lse.copy_(torch.where(own[:, None], found_lse, lse))
        return output, lse

    def _note(self, own: torch.Tensor, real: torch.Tensor | None) -> None:
        """To what follows the prefix, its last tokens look like padding; they are none, and may be followed by a crop."""
        if real is None and not bool(own.all()):
            self.rest.real_since_padding = [int(n) for n in own.sum(-1)]

    def _own(self, num_new: int, real: torch.Tensor | None) -> torch.Tensor:
        """Which new tokens `(batch, new_tokens)` are real and come after the prefix."""
        import torch

        is_real = torch.ones(self.batch_size, num_new, dtype=torch.bool) if real is None else real
        begun = torch.tensor(self.begun, device=is_real.device)[:, None]
        return is_real & (begun + is_real.cumsum(-1) > self.prefix_tokens)

    def _prefix_pieces(
        self, keys: torch.Tensor, values: torch.Tensor, own: torch.Tensor, real: torch.Tensor | None
    ) -> list[tuple[int, slice]]:
        """Rows that read on in the prefix, and their columns. Raises UsageError where rows differ, DoesNotFitError where what follows would outgrow its room, before
        anything is written."""
        longest = max(a + int(n) for a, n in zip(self.rest.counts, own.sum(-1)))
        room = self.prefix_tokens + self.rest.regions.total_tokens
        check_room(self.site, longest + self.prefix_tokens, room)
        pieces = []
        for row in range(self.batch_size):
            columns = (~own[row] if real is None else real[row] & ~own[row]).nonzero().flatten().tolist()
            if columns:
                if columns[-1] - columns[0] + 1 != len(columns):
                    raise UsageError(f"{self.site.id}: padding lies between real tokens.")
                pieces.append((row, slice(columns[0], columns[-1] + 1)))
        for row, at in pieces:
            self._check_same(row, at, pieces[0], keys, "keys")
            self._check_same(row, at, pieces[0], values, "values")
        return pieces

    def _check_same(self, row: int, at: slice, first: tuple[int, slice], x: torch.Tensor, name: str) -> None:
        """Compare with what is stored of the prefix, and with the first row that reads it now; rows of a batch may be rounded a little differently."""
        begun, count, lead = self.begun[row], at.stop - at.start, self.begun[first[0]]
        stored = min(count, max(0, self._stored_tokens - begun))
        pairs = [(x[row, :, at][:, :stored], self.prefix.tensors[name][0, :, begun : begun + stored])]
        if lead == begun:
            both = min(count, first[1].stop - first[1].start)
            pairs.append((x[row, :, at][:, :both], x[first[0], :, first[1]][:, :both]))
        for mine, its in pairs:
            if not mine.float().isclose(its.float(), rtol=2.0**-5, atol=2.0**-5).all():
                raise UsageError(
                    f"{self.site.id}: sequence {row} does not begin with the {self.prefix_tokens} tokens that the others share; plan a "
                    "shorter shared prefix."
                )

    @property
    def _stored_tokens(self) -> int:
        """Tokens of the prefix that some row has read."""
        return max(self.begun)

    def _read_on(self, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """A row has read these tokens of the prefix; those that no other has read before are stored."""
        stored, begun = self._stored_tokens, self.begun[row]
        new = max(0, stored - begun)
        self.prefix.counts = [stored]
        if new < keys.shape[2]:
            self.prefix.append(keys[:, :, new:], values[:, :, new:])
        self.begun[row] = begun + keys.shape[2]

    def _merged(
        self, query: torch.Tensor, rest: tuple[torch.Tensor, torch.Tensor], how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows the prefix, together with the prefix, to which all sequences' queries attend as those of one."""
        import torch

        batch_size, heads, num_queries, head_dim = query.shape
        self.prefix.counts = [self._stored_tokens]
        stacked = query.transpose(0, 1).reshape(1, heads, batch_size * num_queries, head_dim)
        found, found_lse = self.prefix._attend(stacked, None, None, replace(how, sinks=None, real=None))
        found = found.view(heads, batch_size, num_queries, -1).transpose(0, 1)
        found_lse = found_lse.view(heads, batch_size, num_queries).transpose(0, 1)
        lse = torch.logaddexp(found_lse, rest[1])
        total = lse if how.sinks is None else torch.logaddexp(lse, how.sinks.float()[:, None])
        output = found * (found_lse - total).exp()[..., None] + rest[0] * (rest[1] - total).exp()[..., None]
        return output.to(query.dtype), lse

    # Batches

    def reorder(self, index: torch.Tensor) -> None:
        self.rest.reorder(index)
        self.begun = [self.begun[int(i)] for i in index]

    def resized(self, index: torch.Tensor) -> SharedPrefixLayer:
        import torch

        prefix = self.prefix.resized(torch.zeros(1, dtype=torch.int64))
        other = SharedPrefixLayer(self.site, self.prefix_tokens, prefix, self.rest.resized(index))
        other.begun = [self.begun[int(i)] for i in index]
        return other

    def check_crop(self, num_tokens: int) -> None:
        if num_tokens > min(self.rest.counts):
            raise UsageError(
                f"{self.site.id}: the last {num_tokens} tokens can't be forgotten; some are of the shared prefix."
            )
        self.rest.check_crop(num_tokens)

    def _forget(self, num_tokens: int) -> None:
        self.rest._forget(num_tokens)

    def reset(self) -> None:
        self.prefix.reset()
        self.rest.reset()
        self.begun = [0] * self.batch_size

    def state(self) -> dict[str, torch.Tensor]:
        import torch

        prefix = {f"prefix.{name}": tensor for name, tensor in self.prefix.state().items()}
        return {**prefix, **self.rest.state(), "begun": torch.tensor(self.begun)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        start = "prefix."
        self.prefix.load_state({name[len(start) :]: x for name, x in state.items() if name.startswith(start)})
        self.rest.load_state({name: x for name, x in state.items() if not name.startswith(start) and name != "begun"})
        self.begun = state["begun"].tolist()
