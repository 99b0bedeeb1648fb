"""A feasible solution and a proven bound in milliseconds, by Lagrangian relaxation.

Every budget gets a price: a byte at a time point, a second, a nat of bounded damage. A peak term's price is spread over
its members, since z >= multiplier * B_a for each of them. Then every group simply takes its cheapest choice, and for
**any** prices that are not negative the total, less what the budgets are worth, is a lower bound (Fisher 1981,
Management Science 27:1). Prices are improved by subgradient steps (multiplicative where they share a fixed mass:
exponentiated gradient, Kivinen and Warmuth 1997). The cheapest choices nearly fit; greedy swaps by loss per priced byte
make them fit and then spend what is left.

With S the price of a family of rows (a tier's time points, the probes of damage, the lanes of seconds), c its weight in
what is minimised and U its budget: S = c + e with e >= 0, and the budget is worth e * U.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from haversack.solve.arrays import Arrays, to_arrays
from haversack.solve.problem import BOUND_TOLERANCE, Evaluation, Problem

NUM_STEPS = 120
"""Subgradient steps. At 2,000 groups of 24 choices a step takes about a millisecond."""

NUM_STARTS, DEARER = 6, 1.3
"""Starts of the greedy search, each with budgets dearer by this factor than the one that didn't come to fit."""

MAX_REPAIR_STEPS, MAX_IMPROVEMENT_TRIES, IMPROVEMENTS_PER_ROUND = 200, 1000, 25
"""Limits of the greedy search; it stops long before them on problems that have room."""


@dataclass(frozen=True)
class Prices:
    """All >= 0. points: (num_points,) per byte; members: (num_members,) share of their term's price, sums to one over
    a term; damage: (num_probes,); seconds: (num_lanes,); links: (num_links,)."""

    points: np.ndarray
    members: np.ndarray
    damage: np.ndarray
    seconds: np.ndarray
    links: np.ndarray


@dataclass(frozen=True)
class Bound:
    """`lower_bound` holds for every solution within the budgets. `chosen` fits, or is None where none was found."""

    lower_bound: float
    chosen: tuple[int, ...] | None
    objective: float | None
    evaluation: Evaluation | None

    @property
    def gap(self) -> float:
        """(objective - lower_bound) / |objective|, infinite without a solution."""
        if self.objective is None:
            return float("inf")
        return max(0.0, self.objective - self.lower_bound) / max(1e-12, abs(self.objective))


def bound(problem: Problem, minimise: str = "damage", *, tier: str | None = None, num_steps: int = NUM_STEPS) -> Bound:
    """Bound and solution for the questions of `exact.solve`: `damage`, `seconds` or `bytes` (peak of `tier`)."""
    relaxation = Relaxation(to_arrays(problem), weights_of(problem, minimise, tier))
    prices, lower = relaxation.ascend(num_steps)
    flat = relaxation.repaired(prices)
    if flat is None:
        return Bound(lower, None, None, None)
    chosen = relaxation.arrays.chosen(flat)
    evaluation = problem.evaluate(chosen)
    objective = relaxation.objective(flat)
    return Bound(min(lower, objective), chosen, objective, evaluation)


def weights_of(problem: Problem, minimise: str, tier: str | None = None) -> dict[str, float]:
    """The objective as weights of `damage`, `seconds` and `peak:TIER`."""
    if minimise == "bytes":
        return {f"peak:{tier or problem.tiers[0]}": 1.0} if problem.tiers else {}
    return {minimise: 1.0}


class Relaxation:
    """One problem's arrays with the objective's weights. `limits` replace the budgets of named values."""

    def __init__(self, arrays: Arrays, weights: Mapping[str, float], limits: Mapping[str, float] | None = None):
        self.arrays = arrays
        problem = arrays.problem
        self.names = [*(f"peak:{name}" for name in arrays.tiers), "damage", "seconds"]
        self.weight = np.array([weights.get(name, 0.0) for name in self.names])
        budgets = {f"peak:{name}": float(num) for name, num in problem.capacity_bytes.items()}
        budgets |= {"damage": _or_inf(problem.max_damage), "seconds": _or_inf(problem.max_seconds), **(limits or {})}
        self.budget = np.array([budgets.get(name, np.inf) for name in self.names])
        self._rows = [np.flatnonzero(arrays.tier_of == i) for i in range(len(arrays.tiers))]
        self._members = np.concatenate([m for m, _ in arrays.terms]) if arrays.terms else np.empty(0, dtype=np.int64)
        self._multiplier = np.array([k for _, k in arrays.terms], dtype=np.int64)
        counts = np.array([len(m) for m, _ in arrays.terms], dtype=np.int64)
        self._term_starts = np.concatenate([[0], np.cumsum(counts)])[:-1].astype(np.int64)
        self._term_of = np.repeat(np.arange(len(arrays.terms)), counts)
        self._by_choice = arrays.account_bytes.T.tocsr()
        self._transposed_sums = arrays.sums.T.tocsr()
        self._transposed_terms = arrays.point_terms.T.tocsr()
        self._table, self._missing = _padded(arrays.starts)

    # What a solution takes, in integers

    def held(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bytes on every account, and at every time point."""
        arrays = self.arrays
        taken = np.zeros(arrays.num_choices, dtype=np.int64)
        taken[flat] = 1
        booked = arrays.account_bytes @ taken
        return booked, self._points(booked)

    def _points(self, booked: np.ndarray) -> np.ndarray:
        arrays = self.arrays
        points = arrays.fixed_bytes + arrays.sums @ booked
        if arrays.terms:
            points = points + arrays.point_terms @ (
                self._multiplier * np.maximum.reduceat(booked[self._members], self._term_starts)
            )
        return points

    def values(self, flat: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Peak bytes per tier, damage, seconds, as `names`."""
        peaks = [float(points[rows].max(initial=0)) for rows in self._rows]
        return np.array([*peaks, self.arrays.damage[:, flat].sum(1).max(), self.arrays.seconds[:, flat].sum(1).max()])

    def objective(self, flat: np.ndarray) -> float:
        return float(self.weight @ self.values(flat, self.held(flat)[1]))

    # Prices

    def cost(self, prices: Prices) -> np.ndarray:
        """(num_choices,): what a choice costs at these prices."""
        arrays = self.arrays
        cost = prices.damage @ arrays.damage + prices.seconds @ arrays.seconds
        account = self._transposed_sums @ prices.points
        if arrays.terms:
            term = (self._transposed_terms @ prices.points) * self._multiplier
            np.add.at(account, self._members, term[self._term_of] * prices.members)
        if len(arrays.accounts):
            cost = cost + self._by_choice @ account
        for price, (if_positions, then_positions) in zip(prices.links, arrays.links, strict=True):
            if price:
                cost[if_positions] += price
                cost[then_positions] -= price
        return cost

    def cheapest(self, cost: np.ndarray) -> np.ndarray:
        """Position of the cheapest choice of every group."""
        table = np.where(self._missing, np.inf, cost[self._table])
        return self._table[np.arange(len(self._table)), table.argmin(axis=1)]

    def lower_bound(self, prices: Prices, cost: np.ndarray, flat: np.ndarray) -> float:
        """Proven for all solutions within the budgets, up to rounding of the sum (1e-12 of its largest part)."""
        masses = self._masses(prices)
        extra = np.maximum(masses - self.weight, 0.0)
        worth = np.where(extra > 0, extra * np.where(np.isfinite(self.budget), self.budget, 0.0), 0.0)
        fixed = float(prices.points @ self.arrays.fixed_bytes)
        parts = (float(cost[flat].sum()), fixed, float(worth.sum()))
        return parts[0] + parts[1] - parts[2] - 1e-12 * max(map(abs, parts))

    def _masses(self, prices: Prices) -> np.ndarray:
        return np.array(
            [*(prices.points[rows].sum() for rows in self._rows), prices.damage.sum(), prices.seconds.sum()]
        )

    def legal(self, prices: Prices) -> Prices:
        """Prices made to keep their rules: not negative, shares that sum to one, mass at least the weight, and
        exactly the weight where there is no budget."""
        masses = []
        parts = [prices.points[rows] for rows in self._rows] + [prices.damage, prices.seconds]
        for part, weight, budget in zip(parts, self.weight, self.budget, strict=True):
            part = np.maximum(part, 0.0)
            total = part.sum()
            wanted = max(weight, total) if np.isfinite(budget) else weight
            masses.append(part * (wanted / total) if total > 0 else np.full(len(part), wanted / max(1, len(part))))
        points = np.zeros(len(prices.points))
        for rows, part in zip(self._rows, masses, strict=False):
            points[rows] = part
        members = np.maximum(prices.members, 0.0)
        if len(members):
            sums = np.add.reduceat(members, self._term_starts)[self._term_of]
            counts = np.bincount(self._term_of)[self._term_of]
            members = np.where(sums > 0, members / np.where(sums > 0, sums, 1.0), 1.0 / counts)
        return Prices(points, members, masses[-2], masses[-1], np.maximum(prices.links, 0.0))

    def ascend(self, num_steps: int) -> tuple[Prices, float]:
        """The best prices found, and their bound."""
        arrays = self.arrays
        families = len(self.names)
        spread_points = [np.full(len(rows), 1.0 / max(1, len(rows))) for rows in self._rows]
        shares = [*spread_points, np.full(len(arrays.damage), 1 / len(arrays.damage))]
        shares.append(np.full(len(arrays.seconds), 1 / len(arrays.seconds)))
        members = np.ones(len(self._members))
        links = np.zeros(len(arrays.links))
        scale = self._scales()
        extra = np.zeros(families)
        can_pay = np.isfinite(self.budget)

        def prices_now() -> Prices:
            points = np.zeros(len(arrays.points))
            masses = self.weight + extra
            for rows, share, mass in zip(self._rows, shares, masses, strict=False):
                points[rows] = share * mass
            return self.legal(Prices(points, members, shares[-2] * masses[-2], shares[-1] * masses[-1], links))

        best = [(prices_now(), -np.inf)]

        def look() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            prices = prices_now()
            cost = self.cost(prices)
            flat = self.cheapest(cost)
            lower = self.lower_bound(prices, cost, flat)
            if lower > best[0][1]:
                best[0] = (prices, lower)
            return flat, *self.held(flat)

        for family in np.flatnonzero(
            can_pay
        ).tolist():  # a first price each: bisection on the excess, the others as they are
            low, high = 0.0, scale[family]
            flat, _, points = look()
            if self.values(flat, points)[family] <= self.budget[family]:
                continue
            for _ in range(40):
                extra[family] = high
                flat, _, points = look()
                if self.values(flat, points)[family] <= self.budget[family]:
                    break
                low, high = high, high * 4
            for _ in range(12):
                extra[family] = (low * high) ** 0.5 if low > 0 else high / 4
                flat, _, points = look()
                if self.values(flat, points)[family] <= self.budget[family]:
                    high = extra[family]
                else:
                    low = extra[family]
        for step in range(num_steps):
            flat, booked, points = look()
            rate = 0.5 / (1.0 + 0.1 * step)
            rows_of = [points[rows] for rows in self._rows]
            rows_of += [arrays.damage[:, flat].sum(1), arrays.seconds[:, flat].sum(1)]
            for family, rows in enumerate(rows_of):
                if len(rows) > 1:
                    spread = max(1e-300, np.ptp(rows))
                    shares[family] = _tilted(shares[family], rate * (rows - rows.max()) / spread)
                if can_pay[family]:
                    over = float(shares[family] @ rows - self.budget[family]) / max(1e-300, abs(self.budget[family]))
                    start = extra[family] if extra[family] > 0 else scale[family] * 1e-3 * (over > 0)
                    extra[family] = start * np.exp(np.clip(4 * rate * over, -1.0, 1.0))
            if len(members):
                of_members = booked[self._members].astype(float)
                most = np.maximum.reduceat(of_members, self._term_starts)[self._term_of]
                tilt = rate * 2 * (of_members - most) / np.maximum(1.0, most)
                members = np.maximum(members * np.exp(tilt), 1e-9)
                members = members / np.maximum.reduceat(members, self._term_starts)[self._term_of]
            for number, (if_positions, then_positions) in enumerate(arrays.links):
                broken = float(np.isin(flat, if_positions).any()) - float(np.isin(flat, then_positions).any())
                links[number] = max(0.0, links[number] + rate * self._link_scale * broken)
        return best[0]

    # Solutions that fit

    def repaired(self, prices: Prices) -> np.ndarray | None:
        """A solution within all budgets near the cheapest one at these prices, or None where the search found none."""
        for _ in range(NUM_STARTS):
            flat = self._keeping_links(self.cost(prices))
            if flat is None:
                return None
            fitted = self._fitted(flat, prices)
            if fitted is not None:
                return self._improved(fitted)
            prices = self._dearer(prices)
        return None

    def _dearer(self, prices: Prices) -> Prices:
        """Budgets cost more against the objective: the next start is nearer to fitting, and loses more."""
        parts = [prices.points[rows] for rows in self._rows] + [prices.damage, prices.seconds]
        factors = [
            (weight + DEARER * max(0.0, part.sum() - weight)) / max(1e-300, part.sum()) if part.sum() > 0 else 1.0
            for part, weight in zip(parts, self.weight, strict=True)
        ]
        points = prices.points.copy()
        for rows, factor in zip(self._rows, factors, strict=False):
            points[rows] *= factor
        dearer = Prices(points, prices.members, prices.damage * factors[-2], prices.seconds * factors[-1], prices.links)
        return self.legal(dearer)

    def _keeping_links(self, cost: np.ndarray) -> np.ndarray | None:
        """Cheapest choices, then broken links mended one by one on the side where that costs less."""
        arrays = self.arrays
        cost = cost.copy()
        flat = self.cheapest(cost)
        for _ in range(arrays.num_groups * 4):
            if not self._broken(flat).any():
                return flat
            number = int(np.flatnonzero(self._broken(flat))[0])
            if_positions, then_positions = arrays.links[number]
            taken = np.isin(if_positions, flat)
            options = [if_positions[taken]]  # leave the choice that requires, or give it what it requires
            group = arrays.group_of[then_positions[0]] if len(then_positions) else -1
            others = np.flatnonzero(arrays.group_of == group)
            options.append(others[~np.isin(others, then_positions)])
            losses = []
            for closing in options:
                trial = cost.copy()
                trial[closing] = np.inf
                after = self.cheapest(trial)
                losses.append(trial[after].sum() if len(closing) and np.isfinite(trial[after]).all() else np.inf)
            if not np.isfinite(min(losses)):
                return None
            cost[options[int(np.argmin(losses))]] = np.inf
            flat = self.cheapest(cost)
        return None

    def _broken(self, flat: np.ndarray) -> np.ndarray:
        """(num_links,) bool."""
        taken = np.zeros(self.arrays.num_choices, dtype=bool)
        taken[flat] = True
        return np.array([taken[a].any() and not taken[b].any() for a, b in self.arrays.links], dtype=bool)

    def _open(self, flat: np.ndarray) -> np.ndarray:
        """(num_choices,) bool: choices that a swap of one group may take now."""
        arrays = self.arrays
        allowed = np.ones(arrays.num_choices, dtype=bool)
        taken = np.zeros(arrays.num_choices, dtype=bool)
        taken[flat] = True
        for if_positions, then_positions in arrays.links:
            if not taken[then_positions].any():
                allowed[if_positions] = False
            elif taken[if_positions].any():
                group = arrays.group_of[then_positions[0]]
                others = np.arange(arrays.starts[group], arrays.starts[group + 1])
                allowed[np.setdiff1d(others, then_positions, assume_unique=True)] = False
        return allowed

    def _use(self, family: int, flat: np.ndarray, booked: np.ndarray, points: np.ndarray) -> np.ndarray:
        """(num_choices,): what a choice takes of a family's worst row as it now stands."""
        arrays = self.arrays
        if family >= len(self._rows):
            rows = arrays.damage if family == len(self._rows) else arrays.seconds
            return rows[int(rows[:, flat].sum(1).argmax())]
        rows_of = self._rows[family]
        worst: int = int(rows_of[points[rows_of].argmax()])
        account = np.zeros(len(arrays.accounts))
        span = slice(arrays.sums.indptr[worst], arrays.sums.indptr[worst + 1])
        account[arrays.sums.indices[span]] += arrays.sums.data[span]
        span = slice(arrays.point_terms.indptr[worst], arrays.point_terms.indptr[worst + 1])
        for term, count in zip(arrays.point_terms.indices[span], arrays.point_terms.data[span], strict=True):
            members, multiplier = arrays.terms[term]
            account[members[booked[members].argmax()]] += count * multiplier
        return self._by_choice @ account if len(account) else np.zeros(arrays.num_choices)

    def _fitted(self, flat: np.ndarray, prices: Prices) -> np.ndarray | None:
        """Swaps, least priced loss per unit of what is over first, until every budget holds."""
        arrays = self.arrays
        cost = self.cost(prices)
        for _ in range(MAX_REPAIR_STEPS):
            booked, points = self.held(flat)
            over = self._over(self.values(flat, points))
            family = int(over.argmax())
            if over[family] <= 0:
                return flat
            use = self._use(family, flat, booked, points)
            saved = use[flat][arrays.group_of] - use
            loss = cost - cost[flat][arrays.group_of]
            able = self._open(flat) & (saved > 0) & np.isfinite(loss)
            if not able.any():
                return None
            columns = np.flatnonzero(able)
            ratio = np.maximum(loss[columns], 0.0) / saved[columns]
            order = columns[np.lexsort((-saved[columns], ratio))]
            _, first = np.unique(arrays.group_of[order], return_index=True)
            order = order[np.sort(first)]
            needed = over[family] * max(1e-300, abs(self.budget[family]))
            count = int(np.searchsorted(np.cumsum(saved[order]), needed)) + 1
            # one at a time where links or peak terms make swaps depend on each other, else all that are needed
            count = 1 if len(arrays.links) else max(1, min(count, len(order)) // (2 if count > 4 else 1))
            swaps = [order[:count], *order[:IMPROVEMENTS_PER_ROUND, None]]
            trials = (self._swapped(flat, columns) for columns in swaps)  # a peak may stay as high by another member
            lower = (t for t in trials if self._over(self.values(t, self.held(t)[1]))[family] < over[family])
            if (found := next(lower, None)) is None:
                return None
            flat = found
        return None

    def _swapped(self, flat: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """A solution with these choices, of different groups, in the place of its own."""
        trial = flat.copy()
        trial[self.arrays.group_of[columns]] = columns
        return trial

    def _over(self, values: np.ndarray) -> np.ndarray:
        """By how much each family passes its budget, relative; at most 0 where it holds."""
        finite = np.isfinite(self.budget)
        size = np.abs(np.where(finite, self.budget, 1.0))
        slack = np.append(np.zeros(len(self._rows)), [BOUND_TOLERANCE, BOUND_TOLERANCE]) * size
        over = np.where(finite, values - np.where(finite, self.budget, 0.0) - slack, -1.0)
        return over / np.maximum(1e-300, size)

    def _improved(self, flat: np.ndarray) -> np.ndarray:
        """Single swaps that lower the objective and still fit, the largest gain first, each checked exactly."""
        arrays = self.arrays
        flat = flat.copy()
        booked, points = self.held(flat)
        values = self.values(flat, points)
        family = int(self.weight.argmax())
        tries = 0
        while tries < MAX_IMPROVEMENT_TRIES:
            use = self._use(family, flat, booked, points)
            gain = use[flat][arrays.group_of] - use
            columns = np.flatnonzero(self._open(flat) & (gain > 1e-12 * max(1.0, abs(values[family]))))
            for limited in np.flatnonzero(np.isfinite(self.budget)):  # a first sieve by the worst row as it stands
                other = self._use(int(limited), flat, booked, points)
                room = self.budget[limited] - values[limited]
                columns = columns[other[columns] - other[flat[arrays.group_of[columns]]] <= room]
            accepted = False
            for column in columns[np.argsort(-gain[columns])][:IMPROVEMENTS_PER_ROUND]:
                tries += 1
                trial = self._swapped(flat, column)
                trial_booked = booked + (
                    self._account_column(column) - self._account_column(flat[arrays.group_of[column]])
                )
                trial_points = self._points(trial_booked)
                trial_values = self.values(trial, trial_points)
                better = self.weight @ trial_values < self.weight @ values
                if better and (self._over(trial_values) <= 0).all():
                    flat, booked, points, values, accepted = trial, trial_booked, trial_points, trial_values, True
                    break
            if not accepted:
                break
        return flat

    def _account_column(self, column: int) -> np.ndarray:
        out = np.zeros(len(self.arrays.accounts), dtype=np.int64)
        span = slice(self._by_choice.indptr[column], self._by_choice.indptr[column + 1])
        out[self._by_choice.indices[span]] = self._by_choice.data[span]
        return out

    def _scales(self) -> np.ndarray:
        """A price that would matter: the objective's spread over the family's spread, over groups."""
        arrays = self.arrays
        account = np.asarray(abs(self._by_choice).sum(axis=1)).ravel() if len(arrays.accounts) else np.zeros(1)
        num_bytes = max(1.0, float(account.mean()))
        spreads = np.array([*(num_bytes for _ in self._rows), _mean_abs(arrays.damage), _mean_abs(arrays.seconds)])
        objective = float(self.weight @ spreads)
        self._link_scale = objective
        return objective / spreads


def _tilted(share: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    share = np.maximum(share * np.exp(exponent), 1e-12)
    return share / share.sum()


def _mean_abs(values: np.ndarray) -> float:
    mean = float(np.abs(values).mean()) if values.size else 0.0
    return mean if mean > 0 else 1.0


def _or_inf(value: float | None) -> float:
    return np.inf if value is None else value


def _padded(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(num_groups, widest) positions, and where a group has none (they repeat its first)."""
    widths = np.diff(starts)
    columns = np.arange(int(widths.max(initial=1)))
    missing = columns[None, :] >= widths[:, None]
    return np.where(missing, starts[:-1, None], starts[:-1, None] + columns[None, :]), missing
