"""Groups that hold one tuple of choices: the same arrays, classes and answers as groups that hold equal tuples of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from haversack.solve.arrays import to_arrays
from haversack.solve.bound import bound
from haversack.solve.classes import classes
from haversack.solve.exact import solve
from haversack.solve.problem import Choice, Group, PeakTerm, Problem, Requires, TimePoint


def experts(seed: int) -> Problem:
    """Layers of experts of two kinds, whose choices book on what all share, on their layer's and on their own accounts."""
    draw = np.random.default_rng(seed)
    num_layers, num_experts = int(draw.integers(1, 4)), int(draw.integers(1, 5))
    kinds = [
        tuple(
            Choice(
                f"o{i}",
                damage=(float(draw.uniform(0, 1)), float(draw.uniform(0, 1))),
                seconds=float(draw.uniform(0, 1)),
                account_bytes={
                    "weights": int(draw.integers(0, 200)),
                    "at site": int(draw.integers(0, 50)),
                    "of layer": int(draw.integers(0, 80)) * int(draw.integers(0, 2)),
                },
            )
            for i in range(int(draw.integers(1, 5)))
        )
        for _ in range(2)
    ]
    groups, sites = [], []
    for layer in range(num_layers):
        for expert in range(num_experts):
            name = f"{layer}.{expert}"
            own = {"at site": f"at {name}", "of layer": f"of {layer}"}
            groups.append(Group(name, kinds[expert % 2], "expert", own))
            sites.append(f"at {name}")
    window = PeakTerm(tuple(f"of {layer}" for layer in range(num_layers)), 2)
    points = (
        TimePoint("load", "device", ("weights",), (window,), 5),
        TimePoint("run", "device", ("weights",), (window, PeakTerm(tuple(sites)))),
    )
    links = ()
    if draw.integers(0, 2) and len(groups) > 1:
        first, second = groups[0], groups[1]
        links = (Requires(first.id, frozenset({first.choices[0].id}), second.id, frozenset({second.choices[0].id})),)
    most = sum(max(c.account_bytes["weights"] for c in group.choices) for group in groups)
    return Problem(tuple(groups), points, {"device": int(most * draw.uniform(0.5, 1.2)) + 150}, links)


def spelled_out(problem: Problem) -> Problem:
    """Every group with choices of its own, that book on its own accounts by name."""
    groups = []
    for group in problem.groups:
        choices = []
        for choice in group.choices:
            booked = {group.own.get(name, name): num_bytes for name, num_bytes in choice.account_bytes.items()}
            choices.append(replace(choice, account_bytes=booked))
        groups.append(Group(group.id, tuple(choices), group.kind))
    return replace(problem, groups=tuple(groups))


@pytest.mark.parametrize("seed", range(24))
def test_what_is_shared_changes_nothing(seed: int) -> None:
    shared = experts(seed)
    plain = spelled_out(shared)
    ours, theirs = to_arrays(shared), to_arrays(plain)
    for name in ("starts", "origin", "damage", "seconds"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    position = [theirs.accounts.index(account) for account in ours.accounts]
    assert (ours.account_bytes.toarray() == theirs.account_bytes.toarray()[position]).all()
    assert classes(ours).members == classes(theirs).members
    chosen = tuple(len(group.choices) - 1 for group in shared.groups)
    assert shared.evaluate(chosen) == plain.evaluate(chosen)
    for question in ("damage", "bytes"):
        one, other = solve(shared, question), solve(plain, question)
        assert one.fits == other.fits and one.objective == pytest.approx(other.objective, rel=1e-9)
        assert one.evaluation.seconds == pytest.approx(other.evaluation.seconds, rel=1e-6)
    assert bound(shared).lower_bound == pytest.approx(bound(plain).lower_bound, rel=1e-9)
