"""Rows of one length: a stream of text cut, or several samples side by side in a row, apart from one another.

Every row of a run has the same length, so that every step has the same peak: the longest sample is planned for from the
beginning.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from haversack.samples.store import TokenStore

NOT_TRAINED = -100
"""The label of a token that nothing is learned from, as transformers' losses have it."""


@dataclass(frozen=True)
class RowArrays:
    """Rows side by side, int64 `(rows, seq_len)`: token ids, labels (`NOT_TRAINED` where nothing is learned), and positions,
    which begin at 0 with every sample. `positions` is None where each row is one sequence. Of pairs, `samples` are the store's numbers of
    all samples in these rows, chosen and rejected by turns, and `sequences` says of each token which of them it belongs to."""

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray | None
    sequences: np.ndarray | None = None
    samples: np.ndarray | None = None

    @property
    def num_trained(self) -> int:
        """Tokens that are predicted: labels behind the first of each row."""
        return int((self.labels[:, 1:] != NOT_TRAINED).sum())

    @property
    def num_averaged(self) -> int:
        """What a loss is the mean over: pairs, or tokens that are predicted."""
        return self.num_trained if self.samples is None else len(self.samples) // 2


@dataclass(frozen=True)
class PackedRows:
    """A store's rows of `seq_len` tokens. Of a stream, row i is its tokens from `i * seq_len` on (what is left at its end is
    not used, unless there is nothing else); of samples, the samples that `members` puts together."""

    store: TokenStore
    seq_len: int
    padding_id: int
    together: bool = True
    members: tuple[tuple[int, ...], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        members: Sequence[Sequence[int]] = ()
        if not self.store.is_stream:
            ends = self.store.arrays["ends"]
            lengths = np.diff(ends[1::2] if self.store.is_pairs else ends, prepend=0)
            members = best_fit(lengths, self.seq_len) if self.together else [[i] for i in range(len(lengths))]
            if self.store.is_pairs:
                members = [[sample for pair in row for sample in (2 * pair, 2 * pair + 1)] for row in members]
        object.__setattr__(self, "members", tuple(tuple(row) for row in members))

    def __len__(self) -> int:
        if self.store.is_stream:
            return max(1, self.store.num_tokens // self.seq_len)
        return len(self.members)

    @property
    def apart(self) -> bool:
        """Whether rows hold several samples that must not see one another."""
        return not self.store.is_stream and (self.together or self.store.is_pairs)

    @property
    def fill(self) -> float:
        """The share of the rows' places that hold tokens."""
        used = min(self.store.num_tokens, len(self) * self.seq_len)
        return used / (len(self) * self.seq_len)

    def rows(self, numbers: Sequence[int]) -> RowArrays:
        """Some rows, in this order."""
        ids = np.full((len(numbers), self.seq_len), self.padding_id, np.int64)
        labels = np.full((len(numbers), self.seq_len), NOT_TRAINED, np.int64)
        positions = np.zeros((len(numbers), self.seq_len), np.int64)
        sequences = np.zeros((len(numbers), self.seq_len), np.int64)
        counted = 0
        tokens, trained = self.store.arrays["tokens"], self.store.arrays["trained"]
        for at, number in enumerate(numbers):
            place = 0
            for start, end in self._spans(number):
                count = end - start
                inside = slice(place, place + count)
                ids[at, inside] = tokens[start:end]
                labels[at, inside] = np.where(trained[start:end] != 0, tokens[start:end], NOT_TRAINED)
                if not self.store.is_stream:
                    labels[at, place] = NOT_TRAINED  # nothing of its own stands before it
                positions[at, inside] = np.arange(count)
                sequences[at, inside] = counted
                counted += 1
                place += count
            positions[at, place:] = np.arange(self.seq_len - place)  # padding is a sample of its own
        if self.store.is_pairs:
            samples = np.array([sample for number in numbers for sample in self.members[number]], np.int64)
            return RowArrays(ids, labels, positions, sequences, samples)
        return RowArrays(ids, labels, positions if self.apart else None)

    def origins(self, number: int) -> list[str]:
        """`file:row` of what a row holds, for messages."""
        return list(dict.fromkeys(self.store.origin(start) for start, _ in self._spans(number)))

    def _spans(self, number: int) -> list[tuple[int, int]]:
        if self.store.is_stream:
            start = number * self.seq_len
            return [(start, min(start + self.seq_len, self.store.num_tokens))]
        return [self.store.bounds(sample) for sample in self.members[number]]


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Samples put together so that each row holds at most `capacity` tokens: longest first, each into the fullest row that
    has room. Johnson et al. 1974: at most 11/9 of the fewest rows, and 4 more."""
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # sorted, of rows that have any
    for sample in np.argsort(-np.asarray(lengths), kind="stable"):
        length = int(lengths[sample])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            rows.append([])
            row, room = len(rows) - 1, capacity
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        rows[row].append(int(sample))
        left = room - length
        if left:
            if left not in by_room:
                by_room[left] = []
                bisect.insort(rooms, left)
            by_room[left].append(row)
    return rows


def rows_of_step(step: int, rows_per_step: int, num_rows: int, seed: int) -> list[int]:
    """Which rows step number `step` (from 0) trains on: each epoch is a seeded permutation of all rows, and steps go through
    them without a gap. A function of its arguments alone, so that a resumed run needs no more than its step."""
    first = step * rows_per_step
    found: list[int] = []
    while len(found) < rows_per_step:
        epoch, offset = divmod(first + len(found), num_rows)
        order = np.random.default_rng([seed, epoch]).permutation(num_rows)
        found += order[offset : offset + rows_per_step - len(found)].tolist()
    return found
