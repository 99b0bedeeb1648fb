"""The layer that holds sinks and a recent ring as they are, and optionally packs what leaves the ring.

Of a sequence's tokens, numbered from 0: the first `sink_tokens` lie in the first slots of the plain slab; the others,
with ordinals o = position - sink_tokens, enter a ring of `ring_tokens` slots (slot o mod ring_tokens). Without a packed
store the ring is all there is. With one, tokens leave the ring in whole groups for a ring of packed groups, so that the
ring keeps between `plain_tokens` and `plain_tokens + group_tokens - 1`. Each sequence of the batch has its own count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar

from haversack.describe.site import AttentionSite
from haversack.errors import UsageError
from haversack.ledger import StoredTensor
from haversack.parts.kv.attention import as_block, attend_blocks, decode_form, key_block_tokens, sees_causally
from haversack.parts.kv.base import KEY_BLOCK_TOKENS_PREFILL, Attending, KVLayer, PackedGroups, Regions, check_room
from haversack.parts.kv.rows import SlabLayer

if TYPE_CHECKING:
    import torch

    from haversack.kernels.attention import DecodeAttention
    from haversack.kernels.triton_attention import TritonAttention
    from haversack.parts.kv.attention import Block


class RingLayer(SlabLayer):
    """See the module's docstring. `packed` is None for a representation that keeps tokens as they are."""

    counters = ("counts", "packed_until", "real_since_padding")
    learns: ClassVar[bool] = False
    """Whether it takes something from the queries of every step, so that no other code may attend in its place."""
    packed_until: list[int]
    """Ordinals below are in the packed groups, or dropped."""
    real_since_padding: list[int]
    """The last columns that were all real: how far a crop may go."""

    def __init__(
        self,
        site: AttentionSite,
        regions: Regions,
        *,
        batch_size: int,
        ring_tokens: int,
        declared: tuple[StoredTensor, ...],
        tensors: dict[str, torch.Tensor],
        rebuild: Callable[[int], KVLayer],
        packed: PackedGroups | None = None,
        plain_tokens: int = 0,
    ):
        super().__init__(site, regions, batch_size=batch_size, declared=declared, tensors=tensors, rebuild=rebuild)
        self.ring_tokens = ring_tokens
        self.packed = packed
        self.plain_tokens = plain_tokens
        self._decoders: dict[
            float | None, DecodeAttention | TritonAttention | None
        ] = {}  # compiled attention by softcap

    # What is held

    def held_positions(self, row: int) -> tuple[int, ...]:
        count, sinks = self.counts[row], min(self.regions.sink_tokens, self.counts[row])
        oldest = count - self.regions.recent_tokens if self.regions.drops else 0
        return (*range(sinks), *range(max(sinks, oldest), count))

    # Growing

    def append(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None = None) -> None:
        keys, values = keys.detach(), values.detach()  # or a slab would hold the graph of every step
        num_new = keys.shape[2]
        num_real = [num_new] * self.batch_size if real is None else [int(n) for n in real.sum(-1)]
        if not self.regions.drops:
            longest = max(count + n for count, n in zip(self.counts, num_real))
            check_room(self.site, longest, self.regions.total_tokens)
        self.real_since_padding = [
            since + num_new if n == num_new else 0 for since, n in zip(self.real_since_padding, num_real)
        ]
        if all(n == num_new for n in num_real):
            if len(set(self.counts)) == 1:
                self._write(slice(0, self.batch_size), keys, values)
                return
            real = None
        for row in range(self.batch_size):
            rows = slice(row, row + 1)
            if real is None or num_real[row] == num_new:
                self._write(rows, keys[rows], values[rows])
            elif num_real[row]:
                index = real[row].nonzero().squeeze(-1)
                self._write(rows, keys[rows].index_select(2, index), values[rows].index_select(2, index))

    def packs_at_next_append(self) -> bool:
        """Whether one more token in every sequence makes a group leave the ring."""
        if self.packed is None:
            return False
        size, before = self.packed.group_tokens, self.regions.sink_tokens + self.plain_tokens - 1
        return any((n - before) // size * size > until for n, until in zip(self.counts, self.packed_until))

    def note_appended(self) -> None:
        """One real token of every sequence was written to its slot by other code (`kernels.ir_tape`); no group left."""
        self.counts = [count + 1 for count in self.counts]
        self.real_since_padding = [since + 1 for since in self.real_since_padding]

    def _write(self, rows: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store new real tokens of rows that all have seen the same number."""
        count, num_new, sinks = self.counts[rows.start], keys.shape[2], self.regions.sink_tokens
        slab_keys, slab_values = self.tensors["keys"], self.tensors["values"]
        to_sinks = min(num_new, max(0, sinks - count))
        if to_sinks:
            slab_keys[rows, :, count : count + to_sinks] = keys[:, :, :to_sinks]
            slab_values[rows, :, count : count + to_sinks] = values[:, :, :to_sinks]
        first = max(0, count - sinks)  # ordinal of the first token that enters the ring
        last = first + num_new - to_sinks
        packed_until = self._pack(rows, keys, values, to_sinks, first, last)
        ordinal = max(first, packed_until, last - self.ring_tokens)
        while ordinal < last:
            slot = ordinal % self.ring_tokens
            span = min(self.ring_tokens - slot, last - ordinal)
            source = slice(to_sinks + ordinal - first, to_sinks + ordinal - first + span)
            slab_keys[rows, :, sinks + slot : sinks + slot + span] = keys[:, :, source]
            slab_values[rows, :, sinks + slot : sinks + slot + span] = values[:, :, source]
            ordinal += span
        for row in range(rows.start, rows.stop):
            self.counts[row] = count + num_new
            self.packed_until[row] = packed_until

    def _pack(self, rows: slice, keys: torch.Tensor, values: torch.Tensor, offset: int, first: int, last: int) -> int:
        """Move whole groups that leave the ring into the packed store, a bounded piece at a time.

        Ordinals below `first` are read from the ring, the others from the new tokens, which start at `offset`. Returns
        the first ordinal that stays in the ring.
        """
        done = self.packed_until[rows.start]
        if self.packed is None:
            return done
        size = self.packed.group_tokens
        until = max(done, (last - self.plain_tokens) // size * size)
        # groups that this same append would overwrite are never packed
        begin = max(done, until - self.packed.num_groups * size)
        while begin < until:
            slot = begin // size % self.packed.num_groups
            groups = min(
                (until - begin) // size, self.packed.num_groups - slot, max(1, KEY_BLOCK_TOKENS_PREFILL // size)
            )
            end = begin + groups * size
            self.packed.write(
                rows,
                slot,
                self._gather(rows, "keys", keys, offset, first, begin, end),
                self._gather(rows, "values", values, offset, first, begin, end),
            )
            begin = end
        return until

    def _gather(
        self, rows: slice, name: str, new: torch.Tensor, offset: int, first: int, begin: int, end: int
    ) -> torch.Tensor:
        """Tokens of ordinals `[begin, end)`, from the ring and then from the new ones."""
        import torch

        if begin >= first:
            return new[:, :, offset + begin - first : offset + end - first]
        ordinals = torch.arange(begin, min(first, end), device=new.device)
        old = self.tensors[name][rows].index_select(2, self.regions.sink_tokens + ordinals % self.ring_tokens)
        if end <= first:
            return old
        return torch.cat([old, new[:, :, offset : offset + end - first].to(old.dtype)], dim=2)

    # Attending

    def _attend(
        self, query: torch.Tensor, new_keys: torch.Tensor | None, new_values: torch.Tensor | None, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        num_queries, device, real = query.shape[2], query.device, how.real
        if num_queries == 1 and real is None and not (torch.is_grad_enabled() and query.requires_grad):
            decoder = self.decoder(how.softcap)
            if decoder is not None and query.dtype == self.tensors["keys"].dtype:
                stored = (self.counts, self.packed_until)
                return decoder(query, new_keys, new_values, *stored, scaling=how.scaling, sinks=how.sinks)
        new = None
        if new_keys is not None and new_values is not None:
            window = self.regions.recent_tokens + 1 if self.regions.drops else None
            if sees_causally(query, new_keys, new_values, how=how, window_tokens=window):
                new = (new_keys, new_values)
        uniform = real is None and len(set(self.counts)) == 1
        counts = torch.tensor(self.counts[:1] if uniform else self.counts, dtype=torch.int32, device=device)[:, None]
        if real is None:
            query_positions = counts + torch.arange(num_queries, dtype=torch.int32, device=device)
        else:
            query_positions = counts + real.to(torch.int32).cumsum(-1, dtype=torch.int32) - 1

        def blocks(start: int, stop: int) -> Iterator[Block]:
            positions = query_positions[:, start:stop]
            size = key_block_tokens(num_queries)
            yield from self._packed_blocks(positions, size, uniform)
            yield from self._plain_blocks(positions, size, uniform)
            if new is None and new_keys is not None and new_values is not None:
                yield from self._new_blocks(
                    new_keys, new_values, query_positions, real, start, stop, min(size, KEY_BLOCK_TOKENS_PREFILL)
                )

        return attend_blocks(
            query,
            blocks if new is None or any(self.counts) else None,
            num_kv_heads=self.site.num_kv_heads,
            value_head_dim=self.site.value_head_dim,
            scaling=how.scaling,
            softcap=how.softcap,
            sinks=how.sinks,
            new=new,
        )

    def decoder(self, softcap: float | None = None) -> DecodeAttention | TritonAttention | None:
        """Compiled attention of one query per sequence to this layer; None where blocks are attended to one by one."""
        if softcap not in self._decoders:
            self._decoders[softcap] = self._make_decoder(softcap)
        return self._decoders[softcap]

    def _make_decoder(self, softcap: float | None) -> DecodeAttention | TritonAttention | None:
        slab = self.tensors["keys"]
        bits = (0, 0) if self.packed is None else self.packed.code_bits
        size = 64 if self.packed is None else self.packed.group_tokens
        form = None if bits is None else decode_form(self.site, slab.dtype, *bits, size, slab.device.type)
        if form is None:
            return None
        from haversack.kernels.attention import decode_attention

        return decode_attention(
            form,
            self.tensors,
            sink_tokens=self.regions.sink_tokens,
            ring_tokens=self.ring_tokens,
            recent_tokens=self.regions.recent_tokens,
            num_groups=0 if self.packed is None else self.packed.num_groups,
            softcap=softcap,
        )

    def _packed_blocks(self, positions: torch.Tensor, size: int, uniform: bool) -> Iterator[Block]:
        import torch

        if self.packed is None or not any(self.packed_until):
            return
        tokens, slots = self.packed.group_tokens, self.packed.num_groups
        until = [n // tokens for n in self.packed_until[:1]] if uniform else [n // tokens for n in self.packed_until]
        used = min(slots, max(until))
        per_block = max(1, size // tokens)
        plain = uniform and not self.regions.drops
        for first in range(0, used, per_block):
            stop = min(first + per_block, used)
            hidden = None
            if not plain:
                device = positions.device
                written = torch.tensor(until, dtype=torch.int32, device=device)[:, None]
                groups = _last_ordinal(written, torch.arange(first, stop, dtype=torch.int32, device=device), slots)
                within = torch.arange(tokens, dtype=torch.int32, device=device)
                ordinals = (groups[:, :, None] * tokens + within).flatten(1)
                hidden = self._hidden(positions, ordinals, ordinals < 0)
            keys, values = self.packed.read(first, stop)
            yield keys, values, hidden
            del keys, values, hidden

    def _plain_blocks(self, positions: torch.Tensor, size: int, uniform: bool) -> Iterator[Block]:
        return self._blocks_by_age(positions, size) if uniform else self._blocks_by_slot(positions, size)

    def _blocks_by_age(self, positions: torch.Tensor, size: int) -> Iterator[Block]:
        """Where all rows hold the same positions: oldest first, so that sums run in the order of an endless cache."""
        import torch

        count, sinks = self.counts[0], min(self.regions.sink_tokens, self.counts[0])
        oldest = max(self.packed_until[0], count - sinks - self.ring_tokens, 0)
        held = count - oldest
        for first in range(0, held, size):
            stop = min(first + size, held)
            hidden = None
            if self._some_hidden(positions.shape[1]):
                ages = torch.arange(first, stop, dtype=torch.int32, device=positions.device)
                ordinals = torch.where(ages < sinks, ages - sinks, ages - sinks + oldest)[None]
                hidden = self._hidden(positions, ordinals, torch.zeros_like(ordinals, dtype=torch.bool))
            spans = self._spans(sinks, oldest, first, stop)
            yield self._slots("keys", spans), self._slots("values", spans), hidden
            del hidden

    def _spans(self, sinks: int, oldest: int, first: int, stop: int) -> list[tuple[int, int]]:
        """Slots of the tokens with ages `[first, stop)`: sinks, then the ring from ordinal `oldest` on."""
        spans: list[tuple[int, int]] = []
        while first < stop:
            if first < sinks:
                slot, end = first, sinks
            else:
                within = (oldest + first - sinks) % self.ring_tokens
                slot, end = self.regions.sink_tokens + within, self.regions.sink_tokens + self.ring_tokens
            length = min(end - slot, stop - first)
            if spans and spans[-1][1] == slot:
                spans[-1] = (spans[-1][0], slot + length)
            else:
                spans.append((slot, slot + length))
            first += length
        return spans

    def _slots(self, name: str, spans: list[tuple[int, int]]) -> torch.Tensor:
        import torch

        parts = [self.tensors[name][:, :, start:stop] for start, stop in spans]
        return as_block(parts[0] if len(parts) == 1 else torch.cat(parts, dim=2))

    def _blocks_by_slot(self, positions: torch.Tensor, size: int) -> Iterator[Block]:
        """Where rows differ: as the slots lie, with what is not there hidden from each row."""
        import torch

        sinks, device = self.regions.sink_tokens, positions.device
        counts = torch.tensor(self.counts, dtype=torch.int32, device=device)[:, None]
        until = torch.tensor(self.packed_until, dtype=torch.int32, device=device)[:, None]
        used = min(max(self.counts), sinks + self.ring_tokens)
        for first in range(0, used, size):
            stop = min(first + size, used)
            slots = torch.arange(first, stop, dtype=torch.int32, device=device)
            ordinals = _last_ordinal(counts - sinks, slots - sinks, self.ring_tokens)
            ordinals = torch.where(slots < sinks, slots - sinks, ordinals)  # sinks have negative ordinals
            absent = torch.where(slots < sinks, slots >= counts, ordinals < until)
            hidden = self._hidden(positions, ordinals, absent)
            yield self._slots("keys", [(first, stop)]), self._slots("values", [(first, stop)]), hidden
            del hidden

    def _new_blocks(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        real: torch.Tensor | None,
        start: int,
        stop: int,
        size: int,
    ) -> Iterator[Block]:
        import torch

        columns = torch.arange(keys.shape[2], dtype=torch.int32, device=keys.device)
        for first in range(0, stop, size):
            last = min(first + size, stop)
            ordinals = positions[:, first:last] - self.regions.sink_tokens
            absent = torch.zeros_like(ordinals, dtype=torch.bool) if real is None else ~real[:, first:last]
            hidden = self._hidden(positions[:, start:stop], ordinals, absent)
            hidden = hidden | (columns[first:last] > columns[start:stop, None])
            yield as_block(keys[:, :, first:last]), as_block(values[:, :, first:last]), hidden
            del hidden

    def _hidden(self, positions: torch.Tensor, ordinals: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
        """What queries at `positions` (rows, queries) may not see of tokens `(rows, tokens)`: `(rows, 1, queries, tokens)`."""
        hidden = absent[:, None, None, :]
        if not self.regions.drops:
            return hidden.expand(-1, -1, positions.shape[1], -1)
        oldest = positions[:, :, None] - (self.regions.sink_tokens + self.regions.recent_tokens)
        too_old = (ordinals[:, None, :] < oldest) & (ordinals >= 0)[:, None, :]
        return too_old[:, None].logical_or_(hidden)

    def _some_hidden(self, num_queries: int) -> bool:
        """Whether a stored token may lie outside the window of one of the next `num_queries` queries."""
        if not self.regions.drops:
            return False
        longest, ring = max(self.counts), self.regions.sink_tokens + self.regions.recent_tokens
        # one query sees all that an exact ring holds; more queries see ever fewer
        return longest + num_queries - 1 > ring and (num_queries > 1 or self.packed is not None)

    # Batches

    def used_slots(self, name: str) -> int:
        slots = self.tensors[name].shape[2]
        if self.packed is None or name in ("keys", "values"):
            return min(slots, max(self.counts))
        groups = min(self.packed.num_groups, max(self.packed_until) // self.packed.group_tokens)
        return slots // self.packed.num_groups * groups

    def check_crop(self, num_tokens: int) -> None:
        sinks = self.regions.sink_tokens
        overwritten = self.regions.drops and max(self.counts) > sinks + self.ring_tokens
        packed = any(
            count - num_tokens - sinks < until for count, until in zip(self.counts, self.packed_until) if until
        )
        padded = num_tokens > min(self.real_since_padding)
        if padded or overwritten or packed:
            why = "padding" if padded else "tokens that were dropped or packed since"
            raise UsageError(f"{self.site.id}: the last {num_tokens} tokens can't be forgotten; that needs {why} back.")

    def _forget(self, num_tokens: int) -> None:
        self.counts = [count - num_tokens for count in self.counts]
        self.real_since_padding = [since - num_tokens for since in self.real_since_padding]


def _last_ordinal(count: torch.Tensor, slot: torch.Tensor, ring: int) -> torch.Tensor:
    """The newest ordinal below `count` that lies in `slot` of a ring; negative where none does."""
    return count - 1 - (count - 1 - slot).remainder(ring)
