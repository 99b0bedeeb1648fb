"""Which machines, and how many of each, serve a mix of requests for the least money.

Requests of one kind come as a load: the share of one machine's time that they take. A kind is cut into slices, each slice is
given to one type of machine, and machines are bought whole: bins of size one, pooled by type. Solved by integer programming
to a gap of zero. Source: Griggs et al. 2024 (Melange), arXiv 2404.14527, section 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite

from haversack.errors import UsageError

NUM_SLICES = 8
"""Slices per kind of request, as in the source."""


@dataclass(frozen=True)
class Fleet:
    """Machines to rent by name, dollars per hour of them all, and which share of each kind of request each type takes."""

    counts: Mapping[str, int]
    dollars_per_hour: float
    shares: Mapping[str, Mapping[str, float]]


def cheapest_fleet(
    loads: Mapping[str, Mapping[str, float]], dollars_per_hour: Mapping[str, float], *, num_slices: int = NUM_SLICES
) -> Fleet | None:
    """The cheapest machines for `loads[kind][machine]`, in machines (inf or left out: that machine can't serve the kind).

    None where a kind fits on no machine. Raises UsageError for a load that is not above zero.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    kinds, machines = list(loads), list(dollars_per_hour)
    for kind in kinds:
        for machine, load in loads[kind].items():
            if not load > 0:
                raise UsageError(f"the load of {kind!r} on {machine!r} is {load!r}, but must be above zero.")
    pairs = [(k, m) for k in kinds for m in machines if isfinite(loads[k].get(m, inf))]
    if {k for k, _ in pairs} != set(kinds):
        return None
    num_pairs = len(pairs)
    cost = np.concatenate([np.zeros(num_pairs), [dollars_per_hour[m] for m in machines]])
    whole = np.zeros((len(kinds), len(cost)))
    room = np.zeros((len(machines), len(cost)))
    for column, (kind, machine) in enumerate(pairs):
        whole[kinds.index(kind), column] = 1
        room[machines.index(machine), column] = loads[kind][machine] / num_slices
    room[:, num_pairs:] = -np.eye(len(machines))
    upper = [num_slices] * num_pairs + [
        sum(ceil(loads[k][m]) for k in kinds if isfinite(loads[k].get(m, inf))) for m in machines
    ]
    found = milp(
        cost,
        constraints=[LinearConstraint(whole, num_slices, num_slices), LinearConstraint(room, -np.inf, 0.0)],
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, upper),
        options={"mip_rel_gap": 0.0},
    )
    assert found.x is not None, "a kind that some machine serves can be served"
    values = np.rint(found.x).astype(int)
    counts = {m: int(n) for m, n in zip(machines, values[num_pairs:], strict=True) if n}
    shares: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    for (kind, machine), slices in zip(pairs, values[:num_pairs], strict=True):
        if slices:
            shares[kind][machine] = float(slices) / num_slices
    return Fleet(counts, sum(n * dollars_per_hour[m] for m, n in counts.items()), shares)


def most_per_second(rates: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """The number of users with the most requests per second, and that rate."""
    return max(rates, key=lambda row: row[1])
