"""The question that the solver answers: one choice per group, so that at every time point every tier holds its bytes.

Bytes are booked on **accounts**. An account is a name for bytes that live and die together ("weights", "saved
activations of layer 3", "workspace of site q_proj"); a choice books integers on the accounts it touches. At a time
point one tier holds

    fixed_bytes + sum over accounts a of B[a] + sum over peak terms p of multiplier[p] * max over a in p of B[a]

where B[a] is the sum of what the chosen choices book on a. So a resident weight books on an account that every time
point sums; a saved activation on one that is summed from its forward to its backward; a workspace on an account of its
own that stands in a peak term (one site runs at a time); a streamed weight on its layer's account in a peak term with
multiplier 2 (the window holds the layer that computes and the one that is being read). The largest over a tier's time
points is that tier's peak, and must not exceed its capacity, to the byte.

Damage and seconds add up over groups. Either may be a tuple: then each position adds up on its own and the largest sum
counts (the worst of several probes; compute against overlapped reads).

Everything here is plain Python with integers: `Problem.evaluate` is the reference that the solvers are checked with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from haversack.errors import UsageError


@dataclass(frozen=True)
class Choice:
    """What can be done to a group. `id` is unique in its group; equal ids in several groups are the same recipe.

    `damage` in nats per token, `seconds` per decoded token or per step (any finite float; a tuple is explained above),
    `account_bytes` maps account to bytes (integers, not negative; absent means 0).
    """

    id: str
    damage: float | tuple[float, ...] = 0.0
    seconds: float | tuple[float, ...] = 0.0
    account_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """A place where exactly one of `choices` is taken. Groups of one `kind` share what measurements teach.

    `own` says for names that the choices book on which accounts they stand for here. So thousands of groups that differ in nothing
    else, such as a layer's experts, hold one tuple of choices, and what is worked out of it is worked out once.
    """

    id: str
    choices: tuple[Choice, ...]
    kind: str = ""
    own: Mapping[str, str] = field(default_factory=dict)

    def index(self, choice_id: str) -> int | None:
        """Position of a choice, or None where the group has no such choice."""
        return next((i for i, choice in enumerate(self.choices) if choice.id == choice_id), None)


@dataclass(frozen=True)
class PeakTerm:
    """`multiplier` times the largest of `accounts`: bytes that are needed by one member at a time."""

    accounts: tuple[str, ...]
    multiplier: int = 1


@dataclass(frozen=True)
class TimePoint:
    """What one tier holds at one moment; a moment that touches two tiers is two time points."""

    id: str
    tier: str
    accounts: tuple[str, ...] = ()
    peak_terms: tuple[PeakTerm, ...] = ()
    fixed_bytes: int = 0


@dataclass(frozen=True)
class Requires:
    """Taking one of `choices` in `group` requires taking one of `other_choices` in `other_group` (ids)."""

    group: str
    choices: frozenset[str]
    other_group: str
    other_choices: frozenset[str]


def excludes(group: Group, choices: Iterable[str], other: Group, other_choices: Iterable[str]) -> Requires:
    """Taking one of `choices` in `group` forbids `other_choices` in `other`, and so the other way round."""
    allowed = {choice.id for choice in other.choices} - set(other_choices)
    return Requires(group.id, frozenset(choices), other.id, frozenset(allowed))


def together(members: Sequence[tuple[Group, Iterable[str]]]) -> tuple[Requires, ...]:
    """All members take one of their named choices, or none does (a rotation that spans several matrices)."""
    sets = [(group.id, frozenset(choices)) for group, choices in members]
    return tuple(Requires(*a, *b) for a, b in zip(sets, sets[1:] + sets[:1], strict=True)) if len(sets) > 1 else ()


def same_choice(groups: Sequence[Group]) -> tuple[Requires, ...]:
    """All groups take the same choice id (fused neighbours). An id that one of them lacks can't be taken at all."""
    ids = dict.fromkeys(choice.id for group in groups for choice in group.choices)
    return tuple(
        link
        for choice_id in ids
        for link in together([(group, () if group.index(choice_id) is None else (choice_id,)) for group in groups])
    )


@dataclass(frozen=True)
class Evaluation:
    """What a solution really takes. `excess_bytes` by tier where the capacity is passed; `broken_links` by position."""

    damage: float
    seconds: float
    time_point_bytes: tuple[int, ...]
    peak_bytes: dict[str, int]
    excess_bytes: dict[str, int]
    broken_links: tuple[int, ...]
    within_bounds: bool

    @property
    def feasible(self) -> bool:
        return self.within_bounds and not self.excess_bytes and not self.broken_links


BOUND_TOLERANCE = 1e-9
"""Relative slack on bounds of damage and seconds, which are sums of floats; bytes have none."""


@dataclass(frozen=True)
class Problem:
    """Groups, time points, `capacity_bytes` by tier (a tier without one is not limited), links and bounds.

    `max_seconds` and `max_damage` bound the sums, None for no bound.
    Raises UsageError for unknown names, repeated ids, negative or fractional bytes and floats that aren't finite.
    """

    groups: tuple[Group, ...]
    time_points: tuple[TimePoint, ...] = ()
    capacity_bytes: Mapping[str, int] = field(default_factory=dict)
    links: tuple[Requires, ...] = ()
    max_seconds: float | None = None
    max_damage: float | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def tiers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(point.tier for point in self.time_points))

    def account_bytes(self, chosen: Sequence[int]) -> dict[str, int]:
        """Bytes booked on every account by the chosen choices (one index per group)."""
        booked: dict[str, int] = {}
        for group, index in zip(self.groups, chosen, strict=True):
            for name, num_bytes in group.choices[index].account_bytes.items():
                account = group.own.get(name, name)
                booked[account] = booked.get(account, 0) + num_bytes
        return booked

    def evaluate(self, chosen: Sequence[int]) -> Evaluation:
        """Exact bytes at every time point, damage and seconds of a solution, and what it breaks."""
        booked = self.account_bytes(chosen)
        points = tuple(_held_bytes(point, booked) for point in self.time_points)
        peaks = dict.fromkeys(self.tiers, 0)
        for point, num_bytes in zip(self.time_points, points, strict=True):
            peaks[point.tier] = max(peaks[point.tier], num_bytes)
        taken = [group.choices[index] for group, index in zip(self.groups, chosen, strict=True)]
        chosen_ids = self.describe(chosen) if self.links else {}
        damage = largest_sum([as_tuple(choice.damage) for choice in taken])
        seconds = largest_sum([as_tuple(choice.seconds) for choice in taken])
        return Evaluation(
            damage=damage,
            seconds=seconds,
            time_point_bytes=points,
            peak_bytes=peaks,
            excess_bytes={t: peaks[t] - c for t, c in self.capacity_bytes.items() if peaks.get(t, 0) > c},
            broken_links=tuple(i for i, link in enumerate(self.links) if _broken(link, chosen_ids)),
            within_bounds=_within(damage, self.max_damage) and _within(seconds, self.max_seconds),
        )

    def describe(self, chosen: Sequence[int]) -> dict[str, str]:
        """Group id -> choice id."""
        return {group.id: group.choices[i].id for group, i in zip(self.groups, chosen, strict=True)}


def as_tuple(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def largest_sum(rows: Sequence[tuple[float, ...]]) -> float:
    """Largest over positions of the sum over rows; a shorter row counts as 0 beyond its end."""
    width = max((len(row) for row in rows), default=1)
    return max(math.fsum(row[k] for row in rows if k < len(row)) for k in range(width))


def _held_bytes(point: TimePoint, booked: Mapping[str, int]) -> int:
    held = point.fixed_bytes + sum(booked.get(account, 0) for account in point.accounts)
    for term in point.peak_terms:
        held += term.multiplier * max((booked.get(account, 0) for account in term.accounts), default=0)
    return held


def _broken(link: Requires, chosen_ids: Mapping[str, str]) -> bool:
    return chosen_ids[link.group] in link.choices and chosen_ids[link.other_group] not in link.other_choices


def _within(value: float, bound: float | None) -> bool:
    return bound is None or value <= bound + BOUND_TOLERANCE * max(1e-12, abs(bound))


def _check(problem: Problem) -> None:
    choices_of: dict[str, set[str]] = {}
    checked: dict[int, set[str]] = {}  # by the tuple of choices, which many groups may hold
    for group in problem.groups:
        if group.id in choices_of:
            raise UsageError(f"group {group.id!r} stands twice in the problem; group ids must be unique.")
        if id(group.choices) in checked:
            choices_of[group.id] = checked[id(group.choices)]
            continue
        choices_of[group.id] = checked[id(group.choices)] = {choice.id for choice in group.choices}
        if not group.choices or len(choices_of[group.id]) != len(group.choices):
            raise UsageError(f"group {group.id!r} needs at least one choice, each with an id of its own.")
        for choice in group.choices:
            if not all(map(math.isfinite, (*as_tuple(choice.damage), *as_tuple(choice.seconds)))):
                raise UsageError(
                    f"choice {choice.id!r} of group {group.id!r} has damage or seconds that aren't finite."
                )
            for account, num_bytes in choice.account_bytes.items():
                if type(num_bytes) is not int or num_bytes < 0:  # words only for what is wrong: choices come by 100,000
                    _check_bytes(num_bytes, f"choice {choice.id!r} of group {group.id!r} on account {account!r}")
    for point in problem.time_points:
        _check_bytes(point.fixed_bytes, f"time point {point.id!r}")
        for term in point.peak_terms:
            _check_bytes(term.multiplier, f"the multiplier of a peak term of time point {point.id!r}")
    for tier, num_bytes in problem.capacity_bytes.items():
        _check_bytes(num_bytes, f"the capacity of tier {tier!r}")
    for link in problem.links:
        for group_id, ids in ((link.group, link.choices), (link.other_group, link.other_choices)):
            if group_id not in choices_of or not ids <= choices_of[group_id]:
                raise UsageError(f"a link names group {group_id!r} with choices {sorted(ids)}, which don't all exist.")


def _check_bytes(num_bytes: int, where: str) -> None:
    if not isinstance(num_bytes, int) or isinstance(num_bytes, bool) or num_bytes < 0:
        raise UsageError(f"{where} is {num_bytes!r}, but bytes are integers that aren't negative.")
