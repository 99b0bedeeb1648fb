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

HiGHS accepts a row that is violated by 1e-6 and an x that is off an integer by 1e-6. Bytes are therefore scaled so that
1e-6 of a unit is below one byte, by powers of two so that they stay exact; values are scaled to order one; and nothing
is believed before `Problem.evaluate` has counted it in integers.

HiGHS's presolve, as shipped with scipy 1.17.1, lost the optimum of 3 in 277 small programs of exactly this form
(checked against enumeration; without presolve, of none). With every B_a that one row alone uses put into that row it
lost none in 687, and without presolve large programs take ten times as long. So that is what is solved: small programs
without presolve, and the caller solves again without it where an answer contradicts a solution that is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_array, csr_array, diags_array, hstack, vstack

from haversack.solve.arrays import Arrays
from haversack.solve.bound import Prices

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
    """Matrix and bounds for one `Arrays`. Rows for distance from given solutions come with each question."""

    def __init__(self, arrays: Arrays):
        self.arrays = arrays
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
        self.upper[:n] = 1.0
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

    def solve(
        self,
        goal: Goal,
        *,
        upper: Mapping[str, float] | None = None,
        far: Iterable[tuple[Sequence[int], int]] = (),
        near: tuple[Sequence[int], int] | None = None,
        time_limit_seconds: float | None = None,
        presolve: bool = False,
    ) -> Answer:
        """HiGHS's answer. `upper` replaces bounds of named values.

        `far` are (solution, n): at least n groups must differ; `near` likewise: at most n may.
        """
        matrix, low, high = self._contracted
        extra, extra_low, extra_high = self._distances(far, near)
        if extra is not None:
            matrix = csr_array(_stack(matrix, extra))
            low, high = np.concatenate([low, extra_low]), np.concatenate([high, extra_high])
        top = self._top(upper)
        cost, scale = self._cost(goal)
        integrality = np.zeros(self.num_variables)
        integrality[: self.arrays.num_choices] = 1
        options: dict[str, float | bool] = {"mip_rel_gap": 0.0, "presolve": presolve}
        if time_limit_seconds is not None:
            options["time_limit"] = max(0.0, time_limit_seconds)
        result = milp(
            cost / scale,
            integrality=integrality,
            bounds=Bounds(self.lower / self.unit, top / self.unit),
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
            members=dual[at["members"]],
            damage=scale * dual[at["damage"]] / self.unit[self.position["damage"]],
            seconds=scale * dual[at["seconds"]] / self.unit[self.position["seconds"]],
            links=scale * dual[at["links"]],
        )

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
        """Per group the position with the largest x, which is within 1e-6 of one."""
        arrays = self.arrays
        order = np.lexsort((-x[: arrays.num_choices], arrays.group_of))
        return order[arrays.starts[:-1]]

    def _distances(
        self, far: Iterable[tuple[Sequence[int], int]], near: tuple[Sequence[int], int] | None
    ) -> tuple[csr_array | None, np.ndarray, np.ndarray]:
        groups = self.arrays.num_groups
        rows = [(chosen, -np.inf, float(groups - num)) for chosen, num in far]
        if near is not None:
            rows.append((near[0], float(groups - near[1]), np.inf))
        if not rows:
            return None, np.empty(0), np.empty(0)
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
            per_group[row] = most.sum()
        terms = np.array([multiplier * per_group[members].max() for members, multiplier in arrays.terms])
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
        rows.add_block(
            arrays.group_of, np.arange(n), np.ones(n), np.ones(arrays.num_groups), np.ones(arrays.num_groups)
        )

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
            rows.add_block(
                np.tile(np.arange(count), 2),
                np.concatenate([self._account0 + members, np.full(count, column)]),
                np.concatenate(
                    [multiplier * self.unit[self._account0 + members] / self.unit[column], np.full(count, -1.0)]
                ),
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
