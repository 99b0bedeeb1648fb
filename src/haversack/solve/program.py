"""A problem as a mixed-integer program, and HiGHS's answer to it.

    minimise   one of  D (damage), T (seconds), C_r (peak bytes of tier r), or a sum of them
    such that  sum of x over the choices of a group = 1                       for every group
               B_a = sum of bytes[a, c] x_c                                   for every account
               Z_p >= multiplier_p B_a                                        for every peak term p and a in p
               fixed + sum of B_a + sum of Z_p <= C_r + E_r                   for every time point, r its tier
               sum of damage[k, c] x_c <= D,  sum of seconds[l, c] x_c <= T   for every probe k and lane l
               sum over A of x <= sum over B of x                             for every link "A requires B"
               x in {0, 1}

Budgets are upper bounds on the variables C, D and T, so that one matrix serves every question. E_r is zero unless
bytes over the capacity are asked for.

Groups that are the same are counted (`classes.py`): x_c becomes the number of a class's N groups that take c, B_a the
sum over its groups' own accounts, and Z_p >= multiplier_p B_a / N, the mean where the largest is meant. The largest is
stated beside it, with a binary for every number of bytes v that some of the class's choices book beyond others:

    sum of x over choices that book at least v <= N y_v
    Z_p >= multiplier_p (v_0 + sum over v of (v - the number before it) y_v)

HiGHS accepts a row that is violated by 1e-6 and an x that is off an integer by 1e-6. Bytes are therefore scaled so that
1e-6 of a unit is below one byte, by powers of two so that they stay exact; values are scaled to order one; and nothing
is believed before `Problem.evaluate` has counted it in integers.

HiGHS's presolve, as shipped with scipy 1.17.1, lost the optimum of 3 in 277 small programs of exactly this form
(checked against enumeration; without presolve, of none). With every B_a that one row alone uses put into that row it
lost none in 687, and without presolve large programs take ten times as long. So that is what is solved: small programs
without presolve, and the caller solves again without it where an answer contradicts a solution that is known.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_array, csr_array, diags_array, hstack, vstack

from haversack.solve.arrays import Arrays
from haversack.solve.bound import Prices
from haversack.solve.classes import classes

UNITS_AT_CAPACITY = 2.0**20
"""A capacity is this many units: the 1e-6 that HiGHS tolerates is then 1e-12 of it, below a byte up to 0.9 TiB. Where a
capacity is under 1/64 of the most that could be held, that 64th counts instead, which keeps coefficients under 2^26."""

HALF_BYTE = 0.5
"""Added to capacities: integers can't fall between, and a solution that fits to the byte is not lost to rounding."""


@dataclass(frozen=True)
class Answer:
    """What HiGHS said. `flat` is one position per group or None; `bound` is proven in the objective's own unit."""

    flat: np.ndarray | None
    bound: float
    infeasible: bool
    timed_out: bool


@dataclass(frozen=True)
class Goal:
    """A weighted sum over `damage`, `seconds`, `peak:TIER` and `excess:TIER`, to be minimised."""

    weights: Mapping[str, float]


class Program:
    """Matrix and bounds for one `Arrays`. Rows for distance from given solutions come with each question.

    With `merge`, groups that are the same are counted instead of listed, and no solution can be kept at a distance.
    """

    def __init__(self, all_arrays: Arrays, *, merge: bool = True):
        self.all_arrays = all_arrays
        self.classes = classes(all_arrays, merge=merge)
        self.arrays = arrays = self.classes.first
        problem = arrays.problem
        n = arrays.num_choices
        names = [*(f"peak:{t}" for t in arrays.tiers), *(f"excess:{t}" for t in arrays.tiers), "damage", "seconds"]
        num_accounts, num_terms = len(arrays.accounts), len(arrays.terms)
        self._account0, self._term0 = n, n + num_accounts
        value0 = self._term0 + num_terms
        self.position = {name: value0 + i for i, name in enumerate(names)}
        self.num_variables = value0 + len(names)

        unit_of_tier = self._units_of_tiers()
        unit_of_account, unit_of_term = self._units_of_accounts(unit_of_tier)
        self.unit = np.ones(self.num_variables)
        self.unit[self._account0 : self._term0] = unit_of_account
        self.unit[self._term0 : value0] = unit_of_term
        for tier, unit in zip(arrays.tiers, unit_of_tier, strict=True):
            self.unit[[self.position[f"peak:{tier}"], self.position[f"excess:{tier}"]]] = unit
        self.unit[self.position["damage"]] = _spread(arrays.damage, arrays)
        self.unit[self.position["seconds"]] = _spread(arrays.seconds, arrays)

        self.upper = np.full(self.num_variables, np.inf)
        self.upper[:n] = self.classes.multiplicity[arrays.group_of]
        self.lower = np.zeros(self.num_variables)
        self.lower[[self.position["damage"], self.position["seconds"]]] = -np.inf
        for tier in arrays.tiers:
            self.upper[self.position[f"peak:{tier}"]] = problem.capacity_bytes.get(tier, np.inf)
            self.upper[self.position[f"excess:{tier}"]] = 0.0
        if problem.max_damage is not None:
            self.upper[self.position["damage"]] = problem.max_damage
        if problem.max_seconds is not None:
            self.upper[self.position["seconds"]] = problem.max_seconds
        self._rows = self._matrix(unit_of_tier)

    @property
    def is_merged(self) -> bool:
        """Whether some groups are counted instead of listed."""
        return self.arrays is not self.all_arrays

    def solve(
        self,
        goal: Goal,
        *,
        upper: Mapping[str, float] | None = None,
        far: Iterable[tuple[Sequence[int], int]] = (),
        near: tuple[Sequence[int], int] | None = None,
        time_limit_seconds: float | None = None,
        presolve: bool = False,
        gap: float = 0.0,
    ) -> Answer:
        """HiGHS's answer. `upper` replaces bounds of named values.

        `far` are (solution, n): at least n groups must differ; `near` likewise: at most n may. Not in a merged program.
        """
        matrix, low, high = self._contracted
        extra, extra_low, extra_high = self._distances(far, near)
        if extra is not None:
            matrix = csr_array(_stack(matrix, extra))
            low, high = np.concatenate([low, extra_low]), np.concatenate([high, extra_high])
        levels, num_levels = self._levels
        if num_levels:
            rows, rows_low, rows_high = levels.matrix(self.num_variables + num_levels)
            wider = hstack([matrix, csr_array((matrix.shape[0], num_levels))], format="csr")
            matrix = csr_array(vstack([wider, rows], format="csr"))
            low, high = np.concatenate([low, rows_low]), np.concatenate([high, rows_high])
        top = self._top(upper)
        cost, scale = self._cost(goal)
        integrality = np.zeros(self.num_variables + num_levels)
        integrality[: self.arrays.num_choices] = 1
        integrality[self.num_variables :] = 1
        options: dict[str, float | bool] = {"mip_rel_gap": gap, "presolve": presolve}
        if time_limit_seconds is not None:
            options["time_limit"] = max(0.0, time_limit_seconds)
        with _silent_stdout():
            result = milp(
                np.append(cost / scale, np.zeros(num_levels)),
                integrality=integrality,
                bounds=Bounds(
                    np.append(self.lower / self.unit, np.zeros(num_levels)),
                    np.append(top / self.unit, np.ones(num_levels)),
                ),
                constraints=LinearConstraint(matrix, low, high),
                options=options,
            )
        bound = getattr(result, "mip_dual_bound", None)
        return Answer(
            flat=None if result.x is None else self._rounded(result.x),
            bound=-np.inf if bound is None else float(bound) * scale,
            infeasible=result.status == 2,
            timed_out=result.status == 1,
        )

    def prices(
        self, goal: Goal, *, upper: Mapping[str, float] | None = None, time_limit_seconds: float | None = None
    ) -> Prices | None:
        """Prices from the dual of the linear relaxation, in the goal's unit per byte, nat and second.

        They are as good as HiGHS's tolerances allow; `Relaxation.legal` makes them exact. None if HiGHS gives none.
        """
        matrix, low, high = self._rows
        top = self._top(upper)
        equal = low == high
        cost, scale = self._cost(goal)
        result = linprog(
            cost / scale,
            A_ub=matrix[~equal],
            b_ub=high[~equal],
            A_eq=matrix[equal],
            b_eq=high[equal],
            bounds=np.column_stack([self.lower / self.unit, top / self.unit]),
            method="highs",
            options={} if time_limit_seconds is None else {"time_limit": max(0.1, time_limit_seconds)},
        )
        if result.status != 0:
            return None
        dual = np.zeros(len(low))
        dual[~equal] = -np.asarray(result.ineqlin.marginals)
        arrays, at = self.arrays, self._slices
        tier_unit = np.array([self.unit[self.position[f"peak:{name}"]] for name in arrays.tiers])
        return Prices(
            points=scale * dual[at["points"]] / tier_unit[arrays.tier_of],
            members=self._of_all_members(dual[at["members"]]),
            damage=scale * dual[at["damage"]] / self.unit[self.position["damage"]],
            seconds=scale * dual[at["seconds"]] / self.unit[self.position["seconds"]],
            links=scale * dual[at["links"]],
        )

    def _of_all_members(self, duals: np.ndarray) -> np.ndarray:
        """A class's price of a peak term, in equal parts to the accounts that it stands for."""
        parts, start = [], 0
        for (kept, _), (members, _) in zip(self.arrays.terms, self.all_arrays.terms, strict=True):
            of_account = np.zeros(len(self.arrays.accounts))
            of_account[kept] = duals[start : start + len(kept)] / self.classes.account_multiplicity[kept]
            parts.append(of_account[self.classes.stands_for[members]])
            start += len(kept)
        return np.concatenate(parts) if parts else np.empty(0)

    @cached_property
    def _levels(self) -> tuple[_Rows, int]:
        """Rows that state the largest of a class's own accounts, and the number of binaries y_v behind the variables."""
        arrays, rows = self.arrays, _Rows()
        rows.begin("levels")
        column_of: dict[bytes, int] = {}
        booked: dict[int, tuple[int, np.ndarray]] = {}  # what a choice of its group books, per account
        for term, (members, multiplier) in enumerate(arrays.terms):
            for account in members.tolist():
                if account not in booked:
                    booked[account] = self._booked(account)
            floor = max((int(booked[account][1].min()) for account in members.tolist()), default=0)
            unit = self.unit[self._term0 + term]
            for account in members.tolist():
                if (num := int(self.classes.account_multiplicity[account])) == 1:
                    continue
                start, values = booked[account]
                values = np.maximum(values, floor)
                numbers = np.unique(values)
                if len(numbers) == 1:
                    continue
                columns = []
                for number in numbers[1:]:
                    taken = np.flatnonzero(values >= number) + start
                    if (key := taken.tobytes()) not in column_of:
                        column_of[key] = self.num_variables + len(column_of)
                        rows.add_row(
                            np.append(taken, column_of[key]), np.append(np.ones(len(taken)), -float(num)), -np.inf, 0.0
                        )
                    columns.append(column_of[key])
                rows.add_row(
                    np.array([*columns, self._term0 + term]),
                    np.append(multiplier * np.diff(numbers) / unit, -1.0),
                    -np.inf,
                    -multiplier * int(numbers[0]) / unit,
                )
        return rows, len(column_of)

    def _booked(self, account: int) -> tuple[int, np.ndarray]:
        """Where the one group that books on an account starts, and what its choices book; of several groups nothing."""
        arrays = self.arrays
        span = slice(arrays.account_bytes.indptr[account], arrays.account_bytes.indptr[account + 1])
        columns, values = arrays.account_bytes.indices[span], arrays.account_bytes.data[span]
        groups = np.unique(arrays.group_of[columns])
        if len(groups) != 1:
            return 0, np.zeros(1, dtype=np.int64)
        start, stop = int(arrays.starts[groups[0]]), int(arrays.starts[groups[0] + 1])
        out = np.zeros(stop - start, dtype=np.int64)
        out[columns - start] = values
        return start, out

    @cached_property
    def _contracted(self) -> tuple[csr_array, np.ndarray, np.ndarray]:
        """The rows with every B_a that one row alone uses replaced by its sum over choices."""
        matrix, low, high = self._rows
        n, defining = self.arrays.num_choices, self._slices["accounts"]
        others = np.ones(len(low), dtype=bool)
        others[defining] = False
        rows = csr_array(matrix[others])
        uses = np.diff(rows[:, self._account0 : self._term0].tocsc().indptr)
        single = uses <= 1
        alone = diags_array(single.astype(float))
        booked = csr_array(matrix[defining])[:, :n]
        columns = [
            rows[:, :n] + rows[:, self._account0 : self._term0] @ (alone @ booked),
            rows[:, self._account0 : self._term0] @ diags_array((~single).astype(float)),
            rows[:, self._term0 :],
        ]
        contracted = csr_array(hstack(columns, format="csr"))
        contracted.eliminate_zeros()
        kept = csr_array(matrix[defining])[~single]
        return (
            csr_array(vstack([contracted, kept], format="csr")),
            np.concatenate([low[others], low[defining][~single]]),
            np.concatenate([high[others], high[defining][~single]]),
        )

    def _top(self, upper: Mapping[str, float] | None) -> np.ndarray:
        top = self.upper.copy()
        for name, value in (upper or {}).items():
            top[self.position[name]] = value
        peaks = [self.position[f"peak:{name}"] for name in self.arrays.tiers]
        if all(np.isfinite(top[self.position[f"excess:{name}"]]) for name in self.arrays.tiers):
            top[peaks] += HALF_BYTE
        return top

    def _cost(self, goal: Goal) -> tuple[np.ndarray, float]:
        """Cost per unit of every variable, and its largest."""
        cost = np.zeros(self.num_variables)
        for name, weight in goal.weights.items():
            cost[self.position[name]] = weight * self.unit[self.position[name]]
        return cost, max(1e-300, float(np.abs(cost).max()))

    def tolerance(self, goal: Goal) -> float:
        """How far HiGHS's bound may lie beside the truth: twice its 1e-6, in the goal's own unit."""
        return 2e-6 * max(
            (abs(w) * float(self.unit[self.position[name]]) for name, w in goal.weights.items()), default=0.0
        )

    def _rounded(self, x: np.ndarray) -> np.ndarray:
        """One position per group of `all_arrays`: x is within 1e-6 of whole numbers that add up to a class's groups."""
        counts = np.rint(x[: self.arrays.num_choices]).astype(np.int64)
        assert (np.add.reduceat(counts, self.arrays.starts[:-1]) == self.classes.multiplicity).all(), "counts add up"
        return self.classes.spread(counts, self.all_arrays.starts)

    def _distances(
        self, far: Iterable[tuple[Sequence[int], int]], near: tuple[Sequence[int], int] | None
    ) -> tuple[csr_array | None, np.ndarray, np.ndarray]:
        groups = self.arrays.num_groups
        rows = [(chosen, -np.inf, float(groups - num)) for chosen, num in far]
        if near is not None:
            rows.append((near[0], float(groups - near[1]), np.inf))
        if not rows:
            return None, np.empty(0), np.empty(0)
        assert not self.is_merged, "distances are between groups, and these are merged"
        columns = np.concatenate([self.arrays.flat(chosen) for chosen, _, _ in rows])
        left = columns >= 0
        matrix = coo_array(
            (np.ones(left.sum()), (np.repeat(np.arange(len(rows)), groups)[left], columns[left])),
            shape=(len(rows), self.num_variables),
        )
        return csr_array(matrix), np.array([r[1] for r in rows]), np.array([r[2] for r in rows])

    def _units_of_tiers(self) -> np.ndarray:
        arrays = self.arrays
        per_group = np.zeros(len(arrays.accounts))
        by_row = arrays.account_bytes
        for row in range(len(arrays.accounts)):  # the most that an account can hold
            span = slice(by_row.indptr[row], by_row.indptr[row + 1])
            most = np.zeros(arrays.num_groups)
            np.maximum.at(most, arrays.group_of[by_row.indices[span]], by_row.data[span])
            per_group[row] = most @ self.classes.multiplicity
        each = per_group / self.classes.account_multiplicity
        terms = np.array([multiplier * each[members].max() for members, multiplier in arrays.terms])
        held = arrays.fixed_bytes + arrays.sums @ per_group + arrays.point_terms @ terms
        units = np.ones(len(arrays.tiers))
        for i, tier in enumerate(arrays.tiers):
            most_held = held[arrays.tier_of == i].max(initial=0.0)
            capacity = arrays.problem.capacity_bytes.get(tier)
            scale = most_held if capacity is None else min(most_held, max(capacity, most_held / 64))
            units[i] = 2.0 ** math.floor(math.log2(max(1.0, scale))) / UNITS_AT_CAPACITY
        return units

    def _units_of_accounts(self, unit_of_tier: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The smallest unit of the tiers that an account or term counts on."""
        arrays = self.arrays
        account = np.full(len(arrays.accounts), np.inf)
        term = np.full(len(arrays.terms), np.inf)
        for row, tier in enumerate(arrays.tier_of):
            summed = arrays.sums.indices[arrays.sums.indptr[row] : arrays.sums.indptr[row + 1]]
            account[summed] = np.minimum(account[summed], unit_of_tier[tier])
            held = arrays.point_terms.indices[arrays.point_terms.indptr[row] : arrays.point_terms.indptr[row + 1]]
            term[held] = np.minimum(term[held], unit_of_tier[tier])
        for (members, _), unit in zip(arrays.terms, term, strict=True):
            account[members] = np.minimum(account[members], unit)
        return account, term

    def _matrix(self, unit_of_tier: np.ndarray) -> tuple[csr_array, np.ndarray, np.ndarray]:
        """Rows with their lower and upper sides, all in the units of the variables."""
        arrays, rows = self.arrays, _Rows()
        n = arrays.num_choices
        whole = self.classes.multiplicity.astype(float)
        rows.add_block(arrays.group_of, np.arange(n), np.ones(n), whole, whole)

        rows.begin("accounts")
        booked = arrays.account_bytes.tocoo()
        accounts = np.arange(len(arrays.accounts))
        unit = self.unit[self._account0 + accounts]
        rows.add_block(
            np.concatenate([booked.row, accounts]),
            np.concatenate([booked.col, self._account0 + accounts]),
            np.concatenate([booked.data / unit[booked.row], np.full(len(accounts), -1.0)]),
            np.full(len(accounts), -np.inf),
            np.zeros(len(accounts)),
        )
        rows.begin("members")
        for term, (members, multiplier) in enumerate(arrays.terms):
            column, count = self._term0 + term, len(members)
            mean = multiplier / self.classes.account_multiplicity[members]
            rows.add_block(
                np.tile(np.arange(count), 2),
                np.concatenate([self._account0 + members, np.full(count, column)]),
                np.concatenate([mean * self.unit[self._account0 + members] / self.unit[column], np.full(count, -1.0)]),
                np.full(count, -np.inf),
                np.zeros(count),
            )
        rows.begin("points")
        for row in range(len(arrays.points)):
            tier = arrays.tier_of[row]
            columns, counts = [], []
            for matrix, first in ((arrays.sums, self._account0), (arrays.point_terms, self._term0)):
                span = slice(matrix.indptr[row], matrix.indptr[row + 1])
                columns.append(first + matrix.indices[span])
                counts.append(matrix.data[span])
            held = np.concatenate(columns)
            name = arrays.tiers[tier]
            tops = np.array([self.position[f"peak:{name}"], self.position[f"excess:{name}"]])
            rows.add_row(
                np.concatenate([held, tops]),
                np.concatenate([np.concatenate(counts) * self.unit[held] / unit_of_tier[tier], [-1.0, -1.0]]),
                -np.inf,
                -arrays.fixed_bytes[row] / unit_of_tier[tier],
            )
        for name, values in (("damage", arrays.damage), ("seconds", arrays.seconds)):
            rows.begin(name)
            column = self.position[name]
            for lane in values:
                at = np.flatnonzero(lane)
                rows.add_row(np.append(at, column), np.append(lane[at] / self.unit[column], -1.0), -np.inf, 0.0)
        rows.begin("links")
        for if_positions, then_positions in arrays.links:
            rows.add_row(
                np.concatenate([if_positions, then_positions]),
                np.concatenate([np.ones(len(if_positions)), np.full(len(then_positions), -1.0)]),
                -np.inf,
                0.0,
            )
        self._slices = rows.slices()
        return rows.matrix(self.num_variables)


class _Rows:
    """Collects sparse rows with a lower and an upper side."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self.columns: list[np.ndarray] = []
        self.values: list[np.ndarray] = []
        self.low: list[np.ndarray] = []
        self.high: list[np.ndarray] = []
        self.num_rows = 0
        self.starts: dict[str, int] = {}

    def begin(self, name: str) -> None:
        self.starts[name] = self.num_rows

    def slices(self) -> dict[str, slice]:
        """Rows from each `begin` to the next."""
        stops = [*list(self.starts.values())[1:], self.num_rows]
        return {name: slice(start, stop) for (name, start), stop in zip(self.starts.items(), stops, strict=True)}

    def add_block(
        self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> None:
        self.rows.append(rows + self.num_rows)
        self.columns.append(columns)
        self.values.append(values)
        self.low.append(low)
        self.high.append(high)
        self.num_rows += len(low)

    def add_row(self, columns: np.ndarray, values: np.ndarray, low: float, high: float) -> None:
        self.add_block(np.zeros(len(columns), dtype=np.int64), columns, values, np.array([low]), np.array([high]))

    def matrix(self, num_columns: int) -> tuple[csr_array, np.ndarray, np.ndarray]:
        matrix = coo_array(
            (np.concatenate(self.values), (np.concatenate(self.rows), np.concatenate(self.columns))),
            shape=(self.num_rows, num_columns),
        )
        return csr_array(matrix), np.concatenate(self.low), np.concatenate(self.high)


def _stack(matrix: csr_array, extra: csr_array) -> coo_array:
    a, b = matrix.tocoo(), extra.tocoo()
    return coo_array(
        (
            np.concatenate([a.data, b.data]),
            (np.concatenate([a.row, b.row + a.shape[0]]), np.concatenate([a.col, b.col])),
        ),
        shape=(a.shape[0] + b.shape[0], a.shape[1]),
    )


def _spread(values: np.ndarray, arrays: Arrays) -> float:
    """The mean over groups of the largest |value|: the unit in which a group's values are of order one."""
    most = np.zeros(arrays.num_groups)
    np.maximum.at(most, arrays.group_of, np.abs(values).max(axis=0, initial=0.0))
    mean = float(most.mean()) if len(most) else 0.0
    return mean if mean > 0 else 1.0


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Nothing reaches the process's standard output meanwhile: HiGHS (scipy 1.17.1) prints a line of its own debugging at
    some solutions, whatever its options say, and would spoil what `--json` prints.
    """
    flush = ctypes.CDLL(None).fflush  # what C has buffered goes where it was meant for, before and after
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    flush(None)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
