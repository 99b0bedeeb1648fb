"""The cheapest machines against enumeration, and against a mix known by hand."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haversack.errors import UsageError
from haversack.solve.fleet import cheapest_fleet


def by_enumeration(loads: list[list[float]], prices: list[float], num_slices: int) -> float:
    """The least price over every way to share the slices of two machines."""
    best = math.inf
    for split in itertools.product(range(num_slices + 1), repeat=len(loads)):
        first = sum(n * row[0] / num_slices for n, row in zip(split, loads, strict=True))
        second = sum((num_slices - n) * row[1] / num_slices for n, row in zip(split, loads, strict=True))
        cost = math.ceil(first - 1e-6) * prices[0] + math.ceil(second - 1e-6) * prices[1]
        best = min(best, cost)
    return best


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(0.05, 3.0).map(lambda x: round(x, 2))] * 2), min_size=1, max_size=3),
    st.tuples(*[st.floats(0.5, 5.0).map(lambda x: round(x, 1))] * 2),
)
def test_no_way_to_share_is_cheaper(loads: list[tuple[float, float]], prices: tuple[float, float]) -> None:
    rows = {f"kind {i}": {"a": row[0], "b": row[1]} for i, row in enumerate(loads)}
    found = cheapest_fleet(rows, {"a": prices[0], "b": prices[1]}, num_slices=4)
    assert found is not None
    assert found.dollars_per_hour == pytest.approx(by_enumeration([list(r) for r in loads], list(prices), 4), abs=1e-6)
    for name in ("a", "b"):
        taken = sum(found.shares[kind].get(name, 0.0) * rows[kind][name] for kind in rows)
        assert taken <= found.counts.get(name, 0) + 1e-6


def test_small_requests_go_where_they_are_cheap() -> None:
    loads = {"short": {"small": 2.0, "large": 1.0}, "long": {"large": 1.0}}
    found = cheapest_fleet(loads, {"small": 1.0, "large": 5.0})
    assert found is not None and found.counts == {"small": 2, "large": 1} and found.dollars_per_hour == 7.0
    assert cheapest_fleet({"long": {}}, {"small": 1.0}) is None
    with pytest.raises(UsageError, match="above zero"):
        cheapest_fleet({"short": {"small": 0.0}}, {"small": 1.0})
