"""A problem as arrays: choices in one flat row, accounts and time points as sparse integer matrices.

Time points of one tier are merged where they sum the same, and dropped where another of the tier holds at least as much
whatever is chosen, so that hundreds of moments of a run become the few that can bind. Choices that another of their
group beats everywhere are dropped, unless links tell them apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csc_array, csr_array

from haversack.solve.problem import PeakTerm, Problem, TimePoint, as_tuple


@dataclass(frozen=True)
class Arrays:
    """`num_choices` is the number of choices of all groups, `num_groups` of groups.

    starts: (num_groups + 1,), choices of group g are starts[g]:starts[g + 1]; group_of: (num_choices,)
    damage: (num_probes, num_choices), seconds: (num_lanes, num_choices), float64
    account_bytes: (num_accounts, num_choices) int64, only accounts that some kept time point uses
    tiers, points: kept time points; sums: (num_points, num_accounts) times that an account is summed
    terms: distinct peak terms (members by account position, multiplier); point_terms: (num_points, num_terms) counts
    fixed_bytes: (num_points,) int64; tier_of: (num_points,) position in tiers
    links: (if positions, then positions) in the flat row, both arrays
    origin: (num_choices,) position in the row of all the problem's choices, whose groups start at all_starts
    booked_on: of each of the problem's groups, positions of the accounts that its choices name, in their order; -1 unused
    """

    problem: Problem
    starts: np.ndarray
    group_of: np.ndarray
    damage: np.ndarray
    seconds: np.ndarray
    accounts: tuple[str, ...]
    account_bytes: csr_array
    tiers: tuple[str, ...]
    points: tuple[TimePoint, ...]
    tier_of: np.ndarray
    sums: csr_array
    terms: tuple[tuple[np.ndarray, int], ...]
    point_terms: csr_array
    fixed_bytes: np.ndarray
    links: tuple[tuple[np.ndarray, np.ndarray], ...]
    origin: np.ndarray
    all_starts: np.ndarray
    booked_on: tuple[tuple[int, ...], ...]

    @property
    def num_groups(self) -> int:
        return len(self.starts) - 1

    @property
    def num_choices(self) -> int:
        return int(self.starts[-1])

    def flat(self, chosen: Sequence[int]) -> np.ndarray:
        """Positions in the flat row of one index per group of the problem; -1 where that choice was dropped."""
        wanted = self.all_starts[:-1] + np.asarray(chosen, dtype=np.int64)
        at = np.minimum(np.searchsorted(self.origin, wanted), len(self.origin) - 1)
        return np.where(self.origin[at] == wanted, at, -1)

    def chosen(self, flat: np.ndarray) -> tuple[int, ...]:
        """One index per group of the problem."""
        return tuple((self.origin[flat] - self.all_starts[:-1]).tolist())

    def restricted(self, keep: np.ndarray) -> Arrays:
        """The same without the choices where `keep` (num_choices,) is False; every group keeps at least one."""
        position = np.where(keep, np.cumsum(keep) - 1, -1)
        columns = np.flatnonzero(keep)
        group_of = self.group_of[columns]
        links = [(position[a][keep[a]], position[b][keep[b]]) for a, b in self.links]
        return replace(
            self,
            starts=np.searchsorted(group_of, np.arange(self.num_groups + 1)),
            group_of=group_of,
            damage=self.damage[:, columns],
            seconds=self.seconds[:, columns],
            account_bytes=csr_array(self.account_bytes.tocsc()[:, columns]),
            links=tuple((a, b) for a, b in links if len(a)),
            origin=self.origin[columns],
        )


def to_arrays(problem: Problem, *, never_dominated: Iterable[Sequence[int]] = ()) -> Arrays:
    """Arrays of a problem. Choices of solutions in `never_dominated` are neither dropped nor drop others."""
    starts = np.cumsum([0] + [len(group.choices) for group in problem.groups]).astype(np.int64)
    group_of = np.repeat(np.arange(len(problem.groups)), np.diff(starts))
    points = undominated(problem.time_points)

    used = dict.fromkeys(a for point in points for a in (*point.accounts, *_members(point)))
    position = {account: i for i, account in enumerate(used)}
    blocks = _blocks(problem, starts, position)
    account_bytes = _booked(blocks, (len(position), int(starts[-1])))

    distinct: dict[PeakTerm, int] = {}
    sums, counts = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for row, point in enumerate(points):
        sums.update((row, position[account]) for account in point.accounts)
        counts.update((row, distinct.setdefault(term, len(distinct))) for term in point.peak_terms)
    tiers = problem.tiers
    starts_of = {group.id: int(start) for group, start in zip(problem.groups, starts[:-1], strict=True)}
    index_of = {group.id: {c.id: i for i, c in enumerate(group.choices)} for group in problem.groups}

    def positions(group: str, ids: Iterable[str]) -> np.ndarray:
        return np.array(sorted(starts_of[group] + index_of[group][i] for i in ids), dtype=np.int64)

    links = tuple(
        (positions(link.group, link.choices), positions(link.other_group, link.other_choices)) for link in problem.links
    )
    damage = _stacked([block.damage for block in blocks], blocks, int(starts[-1]))
    seconds = _stacked([block.seconds for block in blocks], blocks, int(starts[-1]))
    protected = np.zeros(starts[-1], dtype=bool)
    for chosen in never_dominated:
        protected[starts[:-1] + np.asarray(chosen, dtype=np.int64)] = True
    full = Arrays(
        problem=problem,
        starts=starts,
        group_of=group_of,
        damage=damage,
        seconds=seconds,
        accounts=tuple(position),
        account_bytes=account_bytes,
        tiers=tiers,
        points=points,
        tier_of=np.array([tiers.index(point.tier) for point in points], dtype=np.int64),
        sums=_from_counts(sums, (len(points), len(position))),
        terms=tuple((np.array([position[a] for a in term.accounts]), term.multiplier) for term in distinct),
        point_terms=_from_counts(counts, (len(points), len(distinct))),
        fixed_bytes=np.array([point.fixed_bytes for point in points], dtype=np.int64),
        links=links,
        origin=np.arange(starts[-1]),
        all_starts=starts,
        booked_on=_in_order([row for block in blocks for row in block.booked_on], blocks),
    )
    return full.restricted(_undominated_choices(full, blocks, protected))


@dataclass(frozen=True)
class _Block:
    """Groups that hold one tuple of choices, and what is the same of all.

    groups: (num_groups,); columns: (num_groups, num_choices) positions in the flat row
    damage, seconds: (width, num_choices); names, choices, num_bytes: (num_booked,), what a choice books on a name, as positions
    booked_on: for each group the positions of its accounts, one for each name that its choices book on; -1 where none is used
    """

    groups: np.ndarray
    columns: np.ndarray
    damage: np.ndarray
    seconds: np.ndarray
    names: np.ndarray
    choices: np.ndarray
    num_bytes: np.ndarray
    booked_on: list[tuple[int, ...]]


def _blocks(problem: Problem, starts: np.ndarray, position: dict[str, int]) -> list[_Block]:
    holders: dict[int, list[int]] = {}
    for number, group in enumerate(problem.groups):
        holders.setdefault(id(group.choices), []).append(number)
    return [_block(problem, np.array(numbers), starts, position) for numbers in holders.values()]


def _block(problem: Problem, numbers: np.ndarray, starts: np.ndarray, position: dict[str, int]) -> _Block:
    choices = problem.groups[numbers[0]].choices
    name_of: dict[str, int] = {}
    booked = [
        (name_of.setdefault(name, len(name_of)), column, num_bytes)
        for column, choice in enumerate(choices)
        for name, num_bytes in choice.account_bytes.items()
        if num_bytes
    ]
    names, of_choices, num_bytes = np.array(booked, dtype=np.int64).reshape(-1, 3).T
    booked_on = []
    for number in numbers.tolist():
        own = problem.groups[number].own
        booked_on.append(tuple(position.get(own.get(name, name), -1) for name in name_of))
    return _Block(
        numbers,
        starts[numbers][:, None] + np.arange(len(choices)),
        _padded([as_tuple(choice.damage) for choice in choices]),
        _padded([as_tuple(choice.seconds) for choice in choices]),
        names,
        of_choices,
        num_bytes,
        booked_on,
    )


def _booked(blocks: Sequence[_Block], shape: tuple[int, int]) -> csr_array:
    """(num_accounts, num_choices): bytes that every choice books on every account that is used."""
    rows, columns, values = [], [], []
    for block in blocks:
        on = np.array(block.booked_on, dtype=np.int64).reshape(len(block.groups), -1)[:, block.names]
        rows.append(on.ravel())
        columns.append(block.columns[:, block.choices].ravel())
        values.append(np.broadcast_to(block.num_bytes, on.shape).ravel())
    row, column, value = (
        np.concatenate(parts) if parts else np.empty(0, dtype=np.int64) for parts in (rows, columns, values)
    )
    used = row >= 0
    return csr_array((value[used], (row[used], column[used])), shape=shape)


def _in_order(rows: Sequence[tuple[int, ...]], blocks: Sequence[_Block]) -> tuple[tuple[int, ...], ...]:
    """Rows of groups as blocks hold them, in the order of the groups."""
    by_group = dict(zip((number for block in blocks for number in block.groups.tolist()), rows, strict=True))
    return tuple(by_group[number] for number in range(len(by_group)))


def undominated(points: Sequence[TimePoint]) -> tuple[TimePoint, ...]:
    """Time points that no other of their tier covers: sums a superset, peak terms too, and at least the fixed bytes.

    Bytes are never negative, so a covered time point never holds more than the one that covers it.
    """
    merged: dict[tuple, TimePoint] = {}
    for point in points:
        terms = tuple(
            sorted(
                (tuple(sorted(set(t.accounts))), t.multiplier) for t in point.peak_terms if t.accounts and t.multiplier
            )
        )
        key = (point.tier, tuple(sorted(point.accounts)), terms)
        if key not in merged or merged[key].fixed_bytes < point.fixed_bytes:
            canonical = tuple(PeakTerm(accounts, multiplier) for accounts, multiplier in terms)
            merged[key] = TimePoint(point.id, point.tier, key[1], canonical, point.fixed_bytes)
    kept: list[TimePoint] = []
    rows = [(p, Counter(p.accounts), Counter(p.peak_terms)) for p in merged.values()]
    rows.sort(key=lambda row: -(len(row[0].accounts) + sum(len(t.accounts) for t in row[0].peak_terms)))
    counted: list[tuple[TimePoint, Counter[str], Counter[PeakTerm]]] = []
    for point, accounts, terms_of in rows:
        if not any(_covers(*other, point, accounts, terms_of) for other in counted):
            counted.append((point, accounts, terms_of))
            kept.append(point)
    return tuple(kept)


def _covers(
    big: TimePoint,
    big_accounts: Counter[str],
    big_terms: Counter[PeakTerm],
    point: TimePoint,
    accounts: Counter[str],
    terms: Counter[PeakTerm],
) -> bool:
    if big.tier != point.tier or big.fixed_bytes < point.fixed_bytes or not big_accounts.keys() >= accounts.keys():
        return False
    if not accounts <= big_accounts:
        return False
    left = big_terms - terms
    for term in (terms - big_terms).elements():
        wider = next(
            (t for t in left if t.multiplier >= term.multiplier and set(t.accounts) >= set(term.accounts)), None
        )
        if wider is None:
            return False
        left = left - Counter((wider,))
    return True


def _undominated_choices(arrays: Arrays, blocks: Sequence[_Block], protected: np.ndarray) -> np.ndarray:
    """A choice is dominated by one of its group that costs no more in anything and that no link treats worse.

    Link "a in A requires b in B": leaving `x` for `y` is safe if y is in A only where x is, and in B wherever x is.
    Of equal choices the first stays. Groups of a block whose used accounts are the same ones are looked at once.
    """
    keep = np.ones(arrays.num_choices, dtype=bool)
    by_column = arrays.account_bytes.tocsc()
    link_costs = _link_costs(arrays.links)
    for block in blocks:
        if block.columns.shape[1] == 1:
            continue
        alike: dict[tuple[int, ...], list[int]] = {}
        for row, booked_on in enumerate(block.booked_on):
            columns = block.columns[row]
            if protected[columns].any() or not link_costs.keys().isdisjoint(columns.tolist()):
                keep[columns] = _undominated_of(arrays, by_column, link_costs, columns, protected[columns])
            else:
                alike.setdefault(which_are_one(booked_on), []).append(row)
        for rows in alike.values():
            columns = block.columns[rows[0]]
            keep[block.columns[rows]] = _undominated_of(arrays, by_column, link_costs, columns, protected[columns])
    return keep


def which_are_one(booked_on: tuple[int, ...]) -> tuple[int, ...]:
    """Accounts as numbers in the order in which they are first met; -1 stays."""
    first: dict[int, int] = {-1: -1}
    return tuple(first.setdefault(account, len(first)) for account in booked_on)


def _link_costs(links: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[int, dict[int, int]]:
    """By choice: what each half of a link that names it counts for it."""
    costs: dict[int, dict[int, int]] = {}
    for number, (if_positions, then_positions) in enumerate(links):
        for column in if_positions.tolist():
            costs.setdefault(column, {})[2 * number] = 1
        for column in then_positions.tolist():
            costs.setdefault(column, {})[2 * number + 1] = -1
    return costs


def _undominated_of(
    arrays: Arrays,
    by_column: csc_array,
    link_costs: dict[int, dict[int, int]],
    columns: np.ndarray,
    protected: np.ndarray,
) -> np.ndarray:
    """(len(columns),) bool, of one group's choices."""
    start, stop = int(columns[0]), int(columns[-1]) + 1
    costs = [arrays.damage[:, start:stop], arrays.seconds[:, start:stop]]
    first, last = by_column.indptr[start], by_column.indptr[stop]
    touched, local = np.unique(by_column.indices[first:last], return_inverse=True)
    booked = np.zeros((len(touched), stop - start))
    of_choice = np.repeat(np.arange(stop - start), np.diff(by_column.indptr[start : stop + 1]))
    booked[local, of_choice] = by_column.data[first:last]
    costs.append(booked)
    of_links = sorted({number for column in range(start, stop) for number in link_costs.get(column, {})})
    if of_links:
        rows = [[link_costs.get(c, {}).get(n, 0) for c in range(start, stop)] for n in of_links]
        costs.append(np.array(rows, dtype=float))
    stacked = np.concatenate(costs)
    no_more = (stacked[:, :, None] <= stacked[:, None, :]).all(axis=0)  # [y, x]: y costs no more than x
    earlier = np.triu(np.ones(no_more.shape, dtype=bool), 1)
    beats = no_more & (~no_more.T | earlier)
    beats[protected, :] = False
    return ~beats.any(axis=0) | protected


def _members(point: TimePoint) -> Iterable[str]:
    return (account for term in point.peak_terms for account in term.accounts)


def _stacked(parts: Sequence[np.ndarray], blocks: Sequence[_Block], num_choices: int) -> np.ndarray:
    """(width, num_choices) from each block's part, narrower ones filled with 0."""
    out = np.zeros((max((len(part) for part in parts), default=1), num_choices))
    for part, block in zip(parts, blocks, strict=True):
        out[: len(part), block.columns] = part[:, None, :]
    return out


def _padded(rows: Sequence[tuple[float, ...]]) -> np.ndarray:
    """(width, len(rows)), shorter rows filled with 0."""
    out = np.zeros((max(map(len, rows), default=1), len(rows)))
    for column, row in enumerate(rows):
        out[: len(row), column] = row
    return out


def _from_counts(counts: Counter[tuple[int, int]], shape: tuple[int, int]) -> csr_array:
    return _sparse(list(counts.values()), [r for r, _ in counts], [c for _, c in counts], shape)


def _sparse(values: Sequence[int], rows: Sequence[int], columns: Sequence[int], shape: tuple[int, int]) -> csr_array:
    return csr_array(
        (np.array(values, dtype=np.int64), (np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64))),
        shape=shape,
    )
