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
from scipy.sparse import csr_array

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
    flat_choices = [choice for group in problem.groups for choice in group.choices]
    starts = np.cumsum([0] + [len(group.choices) for group in problem.groups]).astype(np.int64)
    group_of = np.repeat(np.arange(len(problem.groups)), np.diff(starts))
    points = undominated(problem.time_points)

    used = dict.fromkeys(a for point in points for a in (*point.accounts, *_members(point)))
    position = {account: i for i, account in enumerate(used)}
    rows, columns, values = [], [], []
    for column, choice in enumerate(flat_choices):
        for account, num_bytes in choice.account_bytes.items():
            if num_bytes and account in position:
                rows.append(position[account])
                columns.append(column)
                values.append(num_bytes)
    account_bytes = _sparse(values, rows, columns, (len(position), len(flat_choices)))

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
    damage = _stacked([as_tuple(choice.damage) for choice in flat_choices])
    seconds = _stacked([as_tuple(choice.seconds) for choice in flat_choices])
    protected = np.zeros(len(flat_choices), dtype=bool)
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
        origin=np.arange(len(flat_choices)),
        all_starts=starts,
    )
    return full.restricted(_undominated_choices(starts, damage, seconds, account_bytes, links, protected))


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


def _undominated_choices(
    starts: np.ndarray,
    damage: np.ndarray,
    seconds: np.ndarray,
    account_bytes: csr_array,
    links: Sequence[tuple[np.ndarray, np.ndarray]],
    protected: np.ndarray,
) -> np.ndarray:
    """A choice is dominated by one of its group that costs no more in anything and that no link treats worse.

    Link "a in A requires b in B": leaving `x` for `y` is safe if y is in A only where x is, and in B wherever x is.
    Of equal choices the first stays.
    """
    keep = np.ones(starts[-1], dtype=bool)
    by_column = account_bytes.tocsc()
    link_costs: dict[int, dict[int, int]] = {}
    for number, (if_positions, then_positions) in enumerate(links):
        for column in if_positions.tolist():
            link_costs.setdefault(column, {})[2 * number] = 1
        for column in then_positions.tolist():
            link_costs.setdefault(column, {})[2 * number + 1] = -1
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        if stop - start == 1:
            continue
        costs = [damage[:, start:stop], seconds[:, start:stop]]
        first, last = by_column.indptr[start], by_column.indptr[stop]
        touched, local = np.unique(by_column.indices[first:last], return_inverse=True)
        booked = np.zeros((len(touched), stop - start))
        booked[local, np.repeat(np.arange(stop - start), np.diff(by_column.indptr[start : stop + 1]))] = by_column.data[
            first:last
        ]
        costs.append(booked)
        of_links = sorted({number for column in range(start, stop) for number in link_costs.get(column, {})})
        if of_links:
            costs.append(
                np.array([[link_costs.get(c, {}).get(n, 0) for c in range(start, stop)] for n in of_links], dtype=float)
            )
        stacked = np.concatenate(costs)
        no_more = (stacked[:, :, None] <= stacked[:, None, :]).all(axis=0)  # [y, x]: y costs no more than x
        earlier = np.triu(np.ones(no_more.shape, dtype=bool), 1)
        beats = no_more & (~no_more.T | earlier)
        beats[protected[start:stop], :] = False
        keep[start:stop] = ~beats.any(axis=0) | protected[start:stop]
    return keep


def _members(point: TimePoint) -> Iterable[str]:
    return (account for term in point.peak_terms for account in term.accounts)


def _stacked(rows: Sequence[tuple[float, ...]]) -> np.ndarray:
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
