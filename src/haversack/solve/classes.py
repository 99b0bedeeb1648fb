"""Groups that are the same but for the names of their own accounts, so that a program counts them instead of listing them.

A model of 80 equal layers offers the same options 80 times. Which layer takes which makes no difference, but a search
that can't see this proves the same thing in every order. So groups are sorted into classes: equal damage, seconds and
bytes of every choice, on the same accounts, or on accounts that one group alone uses and that play the same part at
every time point (the workspace of a site). Groups that a link names stay alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array

from haversack.solve.arrays import Arrays, which_are_one


@dataclass(frozen=True)
class Classes:
    """`first` holds the first group of every class and its accounts alone.

    members: groups of each class, in order; multiplicity: (num_classes,) how many
    stands_for: (num_accounts of all,) position in `first` of the account that stands for it
    account_multiplicity: (num_accounts of first,) accounts that it stands for, 1 where classes share it
    """

    first: Arrays
    members: tuple[tuple[int, ...], ...]
    multiplicity: np.ndarray
    stands_for: np.ndarray
    account_multiplicity: np.ndarray

    def spread(self, counts: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """One position per group from how many groups of a class take each choice of `first`; `starts` are all groups'."""
        flat = np.empty(len(starts) - 1, dtype=np.int64)
        for number, groups in enumerate(self.members):
            span = counts[self.first.starts[number] : self.first.starts[number + 1]]
            local = np.repeat(np.arange(len(span)), span)
            flat[list(groups)] = starts[list(groups)] + local
        return flat

    def keep_alike(self, keep: np.ndarray, starts: np.ndarray) -> None:
        """What one group of a class keeps, all do: `keep` (num_choices of all,) is changed in place."""
        for groups in self.members:
            if len(groups) > 1:
                at = starts[list(groups)][:, None] + np.arange(starts[groups[0] + 1] - starts[groups[0]])
                keep[at] = keep[at].any(axis=0)


def classes(arrays: Arrays, *, merge: bool = True) -> Classes:
    """The classes of a problem's groups; with `merge` False every group is alone."""
    by_key: dict[object, list[int]] = {}
    keys, private = _keys(arrays) if merge else (range(arrays.num_groups), None)
    for group, key in enumerate(keys):
        by_key.setdefault(key, []).append(group)
    members = tuple(tuple(groups) for groups in by_key.values())
    num_accounts = len(arrays.accounts)
    if len(members) == arrays.num_groups:
        ones = np.ones(arrays.num_groups, dtype=np.int64)
        return Classes(arrays, members, ones, np.arange(num_accounts), np.ones(num_accounts, dtype=np.int64))
    assert private is not None
    stands_for = np.arange(num_accounts)
    account_multiplicity = np.ones(num_accounts, dtype=np.int64)
    for groups in members:
        for other in groups[1:]:
            stands_for[private[other]] = private[groups[0]]
        account_multiplicity[private[groups[0]]] = len(groups)
    kept = np.flatnonzero(stands_for == np.arange(num_accounts))
    position = np.cumsum(stands_for == np.arange(num_accounts)) - 1
    return Classes(
        _first(arrays, [groups[0] for groups in members], kept, position),
        members,
        np.array([len(groups) for groups in members], dtype=np.int64),
        position[stands_for],
        account_multiplicity[kept],
    )


def _keys(arrays: Arrays) -> tuple[list[object], list[list[int]]]:
    """What groups of a class have in common, and every group's own accounts in the order that its class compares them."""
    owner = _owners(arrays)
    roles = _roles(arrays)
    by_choice = arrays.account_bytes.T.tocsr()
    linked = {int(arrays.group_of[p]) for pair in arrays.links for positions in pair for p in positions[:1]}
    kept = arrays.origin - arrays.all_starts[arrays.group_of]
    keys: list[object] = []
    private: list[list[int]] = []
    seen: dict[object, tuple[object, list[int]]] = {}  # groups that hold one tuple of choices are looked at once
    for group, (start, stop) in enumerate(zip(arrays.starts[:-1].tolist(), arrays.starts[1:].tolist(), strict=True)):
        booked_on = arrays.booked_on[group]
        places = tuple(
            (account, -1) if account < 0 or owner[account] != group else (-1, roles[account]) for account in booked_on
        )
        one = which_are_one(booked_on)
        alike = (id(arrays.problem.groups[group].choices), kept[start:stop].tobytes(), places, one)
        if group in linked:
            key, accounts = _key(arrays, by_choice, owner, roles, group)
            keys.append((group, key))
            private.append(accounts)
            continue
        if alike not in seen:
            key, accounts = _key(arrays, by_choice, owner, roles, group)
            seen[alike] = key, [booked_on.index(account) for account in accounts]
        key, order = seen[alike]
        keys.append((None, key))
        private.append([booked_on[place] for place in order])
    return keys, private


def _key(
    arrays: Arrays, by_choice: csr_array, owner: np.ndarray, roles: list[int], group: int
) -> tuple[object, list[int]]:
    """What a group shares with others of its class, and its own accounts in the order that the class compares them."""
    start, stop = int(arrays.starts[group]), int(arrays.starts[group + 1])
    shared: list[tuple[int, int, int]] = []
    own: dict[int, list[tuple[int, int]]] = {}
    for choice in range(start, stop):
        span = slice(by_choice.indptr[choice], by_choice.indptr[choice + 1])
        for account, num_bytes in zip(by_choice.indices[span].tolist(), by_choice.data[span].tolist(), strict=True):
            if owner[account] == group:
                own.setdefault(account, []).append((choice - start, num_bytes))
            else:
                shared.append((choice - start, account, num_bytes))
    booked = sorted((roles[account], tuple(sorted(rows)), account) for account, rows in own.items())
    key = (
        stop - start,
        arrays.damage[:, start:stop].tobytes(),
        arrays.seconds[:, start:stop].tobytes(),
        tuple(sorted(shared)),
        tuple((role, rows) for role, rows, _ in booked),
    )
    return key, [account for *_, account in booked]


def _owners(arrays: Arrays) -> np.ndarray:
    """(num_accounts,): the group that alone books on an account, -1 where several do or none does."""
    owner = np.full(len(arrays.accounts), -1)
    by_row = arrays.account_bytes
    used = np.flatnonzero(np.diff(by_row.indptr))
    if len(used):
        groups = arrays.group_of[by_row.indices]
        first = np.minimum.reduceat(groups, by_row.indptr[used])
        last = np.maximum.reduceat(groups, by_row.indptr[used])
        owner[used] = np.where(first == last, first, -1)
    return owner


def _roles(arrays: Arrays) -> list[int]:
    """A number per account: the same for accounts that every time point sums alike and that the same peak terms hold."""
    parts: list[list[tuple[int, int, int]]] = [[] for _ in arrays.accounts]
    sums = arrays.sums.tocoo()
    for point, account, times in zip(sums.row.tolist(), sums.col.tolist(), sums.data.tolist(), strict=True):
        parts[account].append((0, point, times))
    for term, (accounts, _) in enumerate(arrays.terms):
        for account in accounts.tolist():
            parts[account].append((1, term, 1))
    numbers: dict[tuple, int] = {}
    return [numbers.setdefault(tuple(sorted(part)), len(numbers)) for part in parts]


def _first(arrays: Arrays, groups: list[int], accounts: np.ndarray, position: np.ndarray) -> Arrays:
    """`arrays` with these groups and accounts alone; `position` is where a kept account comes to stand."""
    spans = [np.arange(arrays.starts[group], arrays.starts[group + 1]) for group in groups]
    columns = np.concatenate(spans)
    starts = np.cumsum([0] + [len(span) for span in spans])
    new = np.full(arrays.num_choices, -1)
    new[columns] = np.arange(len(columns))
    is_kept = np.zeros(len(arrays.accounts), dtype=bool)
    is_kept[accounts] = True
    return replace(
        arrays,
        starts=starts,
        group_of=np.repeat(np.arange(len(groups)), np.diff(starts)),
        damage=arrays.damage[:, columns],
        seconds=arrays.seconds[:, columns],
        accounts=tuple(arrays.accounts[account] for account in accounts),
        account_bytes=csr_array(arrays.account_bytes[accounts].tocsc()[:, columns]),
        sums=csr_array(arrays.sums.tocsc()[:, accounts]),
        terms=tuple((position[members[is_kept[members]]], multiplier) for members, multiplier in arrays.terms),
        links=tuple((new[a], new[b]) for a, b in arrays.links),
        origin=arrays.origin[columns],
    )
