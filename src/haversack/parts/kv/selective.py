"""The layer whose heads choose their tokens: slots that are filled, scored by what attention gives them, and freed by blocks.

A sequence is cut into blocks of `block_tokens` by its own positions, whatever the chunks and the padding that it comes in. Within a block a query attends to all that is held
and, causally, to its block. When another block begins, each KV head frees as many tokens as the last one brought beyond its room: never the first `sink_tokens`, never the last
`recent_tokens`, and of the others those of lowest priority. So there are slots for one block more than what is held, and no step needs more. Between two blocks others may say
what tokens are worth: queries that are not stored (`peek`), or a weight by token (`weigh`).

Held tokens fill the first slots of a row in any order, and new ones the slots behind them; all heads of a row hold the same number. What is freed, a block's number of
tokens at a time, is dropped, or moves as one group to a store in another form, where it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from haversack.describe.site import AttentionSite
from haversack.errors import UsageError
from haversack.ledger import DTYPE_BYTES, StoredTensor
from haversack.parts.kv.attention import as_block, attend_blocks, attention_workspace_bytes, key_block_tokens
from haversack.parts.kv.base import Attending, Demote, KVLayer, PackedGroups, Regions, Selection, Slots, check_room
from haversack.parts.kv.rows import SlabLayer

if TYPE_CHECKING:
    import torch

    from haversack.parts.kv.attention import Block

EMPTY = -1
"""Position of a slot that holds nothing."""


class SelectiveLayer(SlabLayer):
    """See the module's docstring."""

    counters = ("counts", "used")
    used: list[int]
    """Slots that hold a token."""

    def __init__(
        self,
        site: AttentionSite,
        regions: Regions,
        selection: Selection,
        slots: Slots,
        *,
        batch_size: int,
        declared: tuple[StoredTensor, ...],
        tensors: dict[str, torch.Tensor],
        rebuild: Callable[[int], KVLayer],
        demote: Demote | None = None,
    ):
        super().__init__(site, regions, batch_size=batch_size, declared=declared, tensors=tensors, rebuild=rebuild)
        self.selection = selection
        self.slots = slots
        self.demote = demote
        self.demoted: PackedGroups | None = demote.store(site, regions, tensors) if demote else None

    # What is held

    def held_positions(self, row: int) -> tuple[int, ...]:
        """Positions that any head of the row holds in any form; `held_by_head` tells apart what each has chosen."""
        if self.demoted is not None:
            return tuple(range(self.counts[row]))
        return tuple(sorted({position for head in self.held_by_head(row) for position in head}))

    def held_by_head(self, row: int) -> tuple[tuple[int, ...], ...]:
        """Positions in the slots of each KV head of sequence `row`, ascending."""
        held = self.tensors["positions"][row, :, : self.used[row]]
        return tuple(tuple(sorted(head)) for head in held.tolist())

    # A step: blocks end inside it, so attending and appending take turns

    def _step(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        batch_size, num_heads, num_new, _ = query.shape
        self._check_room(num_new, how.real)
        output = query.new_zeros((batch_size, num_new, num_heads, values.shape[-1])).transpose(1, 2)
        lse = torch.full((batch_size, num_heads, num_new), -torch.inf, device=query.device)
        for rows, columns in self._pieces(num_new, how.real):
            piece = (slice(rows.start, rows.stop), slice(None), columns)
            self._make_room(rows)
            part, part_lse = self._attend_rows(rows, query[piece], keys[piece], values[piece], how, learn=True)
            output[piece], lse[piece] = part, part_lse
            del part, part_lse  # or they would be alive beside the next piece's
            self._store(rows, keys[piece], values[piece])
        return output, lse

    def append(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Tokens that nobody attended from: they are stored, and weigh nothing yet."""
        self._check_room(keys.shape[2], real)
        for rows, columns in self._pieces(keys.shape[2], real):
            piece = (slice(rows.start, rows.stop), slice(None), columns)
            self._make_room(rows)
            self._store(rows, keys[piece], values[piece])

    def _attend(
        self, query: torch.Tensor, new_keys: torch.Tensor | None, new_values: torch.Tensor | None, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if how.real is not None and not bool(how.real.all()):
            raise UsageError(f"{self.site.id}: padded tokens must be attended and stored in one step.")
        return self._attend_rows(range(self.batch_size), query, new_keys, new_values, how, learn=False)

    def _peek(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: Attending
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        if query.shape[2] > self.regions.block_tokens:
            raise UsageError(
                f"{self.site.id}: {query.shape[2]} tokens can't be peeked at once; a block has {self.regions.block_tokens}."
            )
        if how.real is not None and not bool(how.real.all()):
            raise UsageError(f"{self.site.id}: padded tokens can't be peeked.")
        found = []
        for rows in self._alike():
            part = slice(rows.start, rows.stop)
            found.append(self._attend_rows(rows, query[part], keys[part], values[part], how, learn=False))
            if any(self.counts[row] for row in rows):
                self._learn(rows, query[part], None, found[-1][1], how)
        outputs, lses = zip(*found)
        return (outputs[0], lses[0]) if len(found) == 1 else (torch.cat(outputs), torch.cat(lses))

    def weigh(self, weights: torch.Tensor) -> None:
        """Weights of the last tokens, all of the block that was read last; older ones count for less by the score's `memory`."""
        if not self.selection.weighed:
            return
        for row, (used, count) in enumerate(zip(self.used, self.counts)):
            num = min(weights.shape[1], (count - 1) % self.regions.block_tokens + 1) if count else 0
            self.tensors["importance"][row, :, used - num : used] = weights[row, weights.shape[1] - num :]

    def _check_room(self, num_new: int, real: torch.Tensor | None) -> None:
        """What is dropped needs none; what is demoted stays, in as many groups as were planned and one block before the next."""
        if self.demoted is not None:
            num_real = [num_new] * self.batch_size if real is None else [int(n) for n in real.sum(-1)]
            room = self.regions.slot_tokens - 1 + self.demoted.num_groups * self.demoted.group_tokens
            check_room(self.site, max(count + n for count, n in zip(self.counts, num_real)), room)

    def _pieces(self, num_new: int, real: torch.Tensor | None) -> Iterator[tuple[range, slice]]:
        """Rows and columns of new tokens that lie in one block: all rows together where they stand alike."""
        size = self.regions.block_tokens
        together = real is None or bool(real.all())
        for rows in self._alike() if together else _each(self.batch_size):
            # padding stands on the left, or, in a row that has ended, on the right
            columns = (
                range(num_new)
                if real is None
                else [i for i, is_real in enumerate(real[rows.start].tolist()) if is_real]
            )
            if columns and columns[-1] - columns[0] + 1 != len(columns):
                raise UsageError(f"{self.site.id}: padding lies between real tokens.")
            done = 0
            while done < len(columns):
                left = size - self.counts[rows.start] % size
                stop = min(done + left, len(columns))
                yield rows, slice(columns[done], columns[stop - 1] + 1)
                done = stop

    def _alike(self) -> list[range]:
        """All rows together where they stand alike, else each alone."""
        alike = len({count % self.regions.block_tokens for count in self.counts}) == 1 and len(set(self.used)) == 1
        return [range(self.batch_size)] if alike else _each(self.batch_size)

    def _attend_rows(
        self,
        rows: range,
        query: torch.Tensor,
        new_keys: torch.Tensor | None,
        new_values: torch.Tensor | None,
        how: Attending,
        *,
        learn: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if new_keys is not None and new_values is not None:
            new_keys, new_values = self.slots.as_stored(new_keys, new_values)
        output, lse = attend_blocks(
            query,
            lambda start, stop: self._blocks(rows, new_keys, new_values, start, stop, query.shape[2]),
            num_kv_heads=self.site.num_kv_heads,
            value_head_dim=self.site.value_head_dim,
            scaling=how.scaling,
            softcap=how.softcap,
            sinks=how.sinks,
        )
        if learn:
            self._learn(rows, query, new_keys, lse, how)
        return output, lse

    def _blocks(
        self,
        rows: range,
        new_keys: torch.Tensor | None,
        new_values: torch.Tensor | None,
        start: int,
        stop: int,
        num_queries: int,
        *,
        demoted: bool = True,
    ) -> Iterator[Block]:
        import torch

        device = self.tensors["positions"].device
        used = [self.used[row] for row in rows]
        size = key_block_tokens(num_queries)
        row_slice = slice(rows.start, rows.stop)
        if demoted:
            yield from self._demoted_blocks(rows, size)
        for first in range(0, max(used), size):
            last = min(first + size, max(used))
            hidden = None
            if min(used) < last:
                slots = torch.arange(first, last, device=device)
                hidden = (slots >= torch.tensor(used, device=device)[:, None])[:, None, None, :]
                hidden = hidden.expand(-1, -1, stop - start, -1)
            keys, values = self.slots.read(row_slice, first, last)
            yield keys, values, hidden
            del keys, values, hidden
        if new_keys is not None and new_values is not None:
            columns = torch.arange(stop, device=device)
            hidden = (columns > columns[start:stop, None])[None, None]
            yield as_block(new_keys[:, :, :stop]), as_block(new_values[:, :, :stop]), hidden

    def _demoted_blocks(self, rows: range, size: int) -> Iterator[Block]:
        import torch

        if self.demoted is None:
            return
        tokens = self.demoted.group_tokens
        groups = [(self.counts[row] - self.used[row]) // tokens for row in rows]
        per_block = max(1, size // tokens)
        for first in range(0, max(groups), per_block):
            last = min(first + per_block, max(groups))
            keys, values = self.demoted.read(first, last)
            hidden = None
            if min(groups) < last:
                ordinals = torch.arange(first * tokens, last * tokens, device=keys.device)
                hidden = (ordinals >= torch.tensor(groups, device=keys.device)[:, None] * tokens)[:, None, None, :]
            yield keys[rows.start : rows.stop], values[rows.start : rows.stop], hidden
            del keys, values, hidden

    def _learn(
        self, rows: range, query: torch.Tensor, new_keys: torch.Tensor | None, lse: torch.Tensor, how: Attending
    ) -> None:
        """Add what this piece's queries gave to each stored and new token, from the log-sum-exp, a block of probabilities at a time."""
        import torch

        batch_size, _, num_queries, head_dim = query.shape
        shape = (batch_size, self.site.num_kv_heads, -1, num_queries)
        q = (query.detach().float() * how.scaling).view(*shape, head_dim).flatten(2, 3)
        shift = lse.detach().view(shape).flatten(2, 3)[..., None]
        row_slice = slice(rows.start, rows.stop)
        weights = self.tensors["importance"]
        place = 0
        begun = self.counts[rows.start] % self.regions.block_tokens
        shared = self.used[rows.start] - begun + self.regions.block_tokens  # the same for every piece of a block
        if begun == 0 and self.selection.memory != 1:
            weights[row_slice] *= self.selection.memory
        if self.selection.weighed:
            return
        for keys, values, hidden in self._blocks(rows, new_keys, new_keys, 0, num_queries, num_queries, demoted=False):
            scores = torch.matmul(q, keys.transpose(-1, -2))
            if how.softcap is not None:
                scores = scores.div_(how.softcap).tanh_().mul_(how.softcap)
            scores = scores.sub_(shift).exp_().unflatten(2, (-1, num_queries))
            if hidden is not None:
                scores.masked_fill_(hidden.unsqueeze(2), 0.0)
            length = keys.shape[2]
            weights[row_slice, :, place : place + length] += self.selection.received(scores, held_tokens=shared)
            place = place + length
            del keys, values, hidden, scores  # or two blocks would be alive while the next one is made
        # what new tokens gave one another went behind the longest row's slots, where _store puts them

    def _store(self, rows: range, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put new tokens of one block behind the held ones."""
        import torch

        num_new = keys.shape[2]
        count, used = self.counts[rows.start], self.used[rows.start]
        row_slice = slice(rows.start, rows.stop)
        self.slots.write(row_slice, used, keys.detach(), values.detach())
        positions = torch.arange(count, count + num_new, dtype=torch.int32, device=keys.device)
        if len(rows) > 1:
            counts = torch.tensor([self.counts[row] for row in rows], dtype=torch.int32, device=keys.device)
            positions = (counts - count)[:, None, None] + positions
        self.tensors["positions"][row_slice, :, used : used + num_new] = positions
        for row in rows:
            self.counts[row] += num_new
            self.used[row] += num_new

    def _make_room(self, rows: range) -> None:
        """Where a block begins and slots are short, keep `total_tokens` in the first ones: freed ones among them take kept ones from behind."""
        import torch

        used, keep_tokens = self.used[rows.start], self.regions.total_tokens
        if self.counts[rows.start] % self.regions.block_tokens or used <= keep_tokens:
            return
        row_slice = slice(rows.start, rows.stop)
        positions = self.tensors["positions"][row_slice, :, :used]
        counts = torch.tensor([self.counts[row] for row in rows], device=positions.device)[:, None, None]
        values = self.slots.read(row_slice, 0, used)[1] if self.selection.reads_values else None
        priority = self.selection.priority(self.tensors["importance"][row_slice, :, :used], positions, counts, values)
        del values
        protected = (positions < self.regions.sink_tokens) | (positions >= counts - self.regions.recent_tokens)
        priority = priority.masked_fill(protected, torch.inf)
        kept = torch.zeros_like(protected).scatter_(2, priority.topk(keep_tokens, dim=2, sorted=False).indices, True)
        if self.demoted is not None:
            self._demote(rows, ~kept)
        if self.demote is not None and self.demote.merges:
            self._merge(rows, kept, positions)
        # per head, as many kept ones lie behind the first slots as freed ones lie in them, so the two lists pair up
        to = (~kept[:, :, :keep_tokens]).nonzero()
        source = kept[:, :, keep_tokens:].nonzero()
        to[:, 0] += rows.start
        source[:, 0] += rows.start
        source[:, 2] += keep_tokens
        for tensor in (*self.slots.movable(), self.tensors["positions"], self.tensors["importance"]):
            tensor[to[:, 0], to[:, 1], to[:, 2]] = tensor[source[:, 0], source[:, 1], source[:, 2]]
        self.tensors["positions"][row_slice, :, keep_tokens:] = EMPTY
        self.tensors["importance"][row_slice, :, keep_tokens:] = 0
        for row in rows:
            self.used[row] = keep_tokens

    def _demote(self, rows: range, freed: torch.Tensor) -> None:
        """Pack the freed tokens, in the order of their slots, as one group of each head."""
        assert self.demoted is not None
        row_slice = slice(rows.start, rows.stop)
        held = self.slots.read(row_slice, 0, freed.shape[2])
        slot = (self.counts[rows.start] - self.used[rows.start]) // self.demoted.group_tokens
        self.demoted.write(row_slice, slot, *_taken(held, _places(freed)))

    def _merge(self, rows: range, kept: torch.Tensor, positions: torch.Tensor) -> None:
        """Fold the freed tokens into kept ones, sinks apart, before their slots are taken."""
        assert self.demote is not None
        row_slice = slice(rows.start, rows.stop)
        held = self.slots.read(row_slice, 0, kept.shape[2])
        both = places, freed = _places(kept), _places(~kept)
        weights = self.tensors["importance"][row_slice]
        at, worth = ([x.gather(2, some) for some in both] for x in (positions, weights))
        open_to = at[0] >= self.regions.sink_tokens
        merged = self.demote.merge(
            _taken(held, places), _taken(held, freed), open_to, (at[0], at[1]), (worth[0], worth[1])
        )
        self.slots.replace(row_slice, places, *merged)

    # Batches

    def check_crop(self, num_tokens: int) -> None:
        size = self.regions.block_tokens
        for count, used in zip(self.counts, self.used):
            if num_tokens > count or (count != used and num_tokens > (count - 1) % size + 1):
                raise UsageError(
                    f"{self.site.id}: the last {num_tokens} tokens can't be forgotten; others were freed for them."
                )

    def _forget(self, num_tokens: int) -> None:
        for row in range(self.batch_size):
            self.used[row] -= num_tokens
            self.counts[row] -= num_tokens
            self.tensors["positions"][row, :, self.used[row] :] = EMPTY
            self.tensors["importance"][row, :, self.used[row] :] = 0

    def reset(self) -> None:
        super().reset()
        self.tensors["positions"].fill_(EMPTY)
        self.tensors["importance"].zero_()


def _each(num_rows: int) -> list[range]:
    return [range(row, row + 1) for row in range(num_rows)]


def _places(chosen: torch.Tensor) -> torch.Tensor:
    """Slots that are chosen, as many in each head: `(rows, kv_heads, slots)` bool to `(rows, kv_heads, n)`."""
    return chosen.nonzero()[:, 2].view(*chosen.shape[:2], -1)


def _taken(held: tuple[torch.Tensor, torch.Tensor], places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (x.gather(2, places[..., None].expand(-1, -1, -1, x.shape[-1])) for x in held)
    return keys, values


def selection_workspace_bytes(
    site: AttentionSite,
    regions: Regions,
    *,
    batch_size: int,
    new_tokens: int,
    dtype: str,
    packed: bool = False,
    merges: bool = False,
    reads_values: bool = False,
) -> int:
    """The most bytes one step of `new_tokens` allocates beyond its output.

    Attention over one block's queries, then the same scores once more as probabilities; or what choosing and moving take. `packed` slots are
    unpacked where they are read; with `merges` freed and kept tokens meet in float32; with `reads_values` a score sees all values in float32.
    """
    f32, i64 = DTYPE_BYTES["F32"], 8
    queries = min(new_tokens, regions.block_tokens)
    block_tokens = min(key_block_tokens(queries), max(regions.slot_tokens, regions.demoted_tokens, queries))
    heads = batch_size * site.num_kv_heads
    block_bytes = heads * block_tokens * (site.key_head_dim + site.value_head_dim) * f32
    if (
        packed or regions.demoted_tokens
    ):  # codes, a plane of them, and scales in float32, while the later of keys and values is made
        block_bytes += heads * block_tokens * (2 * max(site.key_head_dim, site.value_head_dim) + 4 * f32)
    attending = attention_workspace_bytes(
        batch_size=batch_size,
        num_heads=site.num_heads,
        num_kv_heads=site.num_kv_heads,
        key_head_dim=site.key_head_dim,
        value_head_dim=site.value_head_dim,
        num_queries=queries,
        block_tokens=block_tokens,
        block_bytes=block_bytes,
    )
    rows = batch_size * site.num_heads
    learning = block_bytes + rows * f32 * (queries * (block_tokens + 2 * (site.key_head_dim + 1)) + 3 * block_tokens)
    slots = heads * regions.slot_tokens
    moved = heads * regions.block_tokens
    head_dims = site.key_head_dim + site.value_head_dim
    freeing = slots * (2 * f32 + i64 + 4) + moved * (9 * i64 + max(head_dims * DTYPE_BYTES[dtype], 2 * f32))
    if regions.demoted_tokens:  # what is freed is read, gathered and packed in float32
        freeing += (slots + 2 * moved) * head_dims * f32
    rounded = 0
    if packed:  # a block is packed in float32 when it is stored, and seen so by its own queries
        freeing += moved * head_dims * 4 * f32
        rounded = heads * queries * head_dims * 3 * f32
    if merges:  # all slots, the kept and the freed ones apart, likenesses, sums and what comes out
        freeing += (5 * slots + 3 * moved) * head_dims * f32
        freeing += moved * regions.total_tokens * (2 * f32 + 1) + slots * (3 * i64 + 2 * f32)
    if reads_values:  # read with the keys; then products with a basis, and what is made of them
        freeing += (
            slots * (site.key_head_dim + 3 * site.value_head_dim + 4) * f32 + heads * 4 * site.value_head_dim**2 * f32
        )
    piece = rows * queries * site.value_head_dim * DTYPE_BYTES[dtype]  # a block's output, before it is put in place
    causal = queries * queries + 2 * queries * i64
    return rows * new_tokens * f32 + causal + max(attending + piece + rounded, learning + piece + rounded, freeing)
