"""What goes with a dropped matrix: where the one that ends a block is dropped, those before it cost nothing more to drop, and
where that block is attention, nor does its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from haversack.cost.candidates import KVCandidate, SharedCosts, WeightCandidates
from haversack.cost.damage import NONE, Damage
from haversack.describe.site import WeightSite
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.nothing import NothingKV
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.dropped import DroppedGrid
from haversack.solve.problem import Problem, Requires

NOTHING = KVOption(represent=NothingKV())
"""A cache of no bytes."""

_END_OF = {"query": "output", "key": "output", "value": "output", "qkv": "output", "gate": "down", "up": "down"}
"""Role of the matrix that ends a block, by those of the matrices before it."""


def is_dropped(option: WeightOption) -> bool:
    """Whether nothing of the matrix is left."""
    return isinstance(option.grid, DroppedGrid) and not option.corrections


def follows_for_free(site: WeightSite, option: WeightOption) -> Damage | None:
    """The damage of dropping a matrix that stands before the end of its block, None of any other choice."""
    if is_dropped(option) and site.role in _END_OF:
        return Damage(0.0, "proxied", source="dropped only with the end of its block, whose damage holds all")
    return None


def _dropping(costs: SharedCosts) -> frozenset[str]:
    """Ids of the candidates that leave nothing."""
    return frozenset(id for id, cost in costs.rows.items() if is_dropped(cost.option))


def with_nothing(
    weights: Sequence[WeightCandidates], layer: int, damages: Mapping[KVOption, Damage]
) -> Mapping[KVOption, Damage]:
    """The options of a layer's cache, with none at all beside them where the layer's attention may be dropped."""
    may_drop = any(row.site.layer == layer and row.site.role == "output" and _dropping(row.shared) for row in weights)
    return {**damages, NOTHING: NONE} if may_drop else damages


def caches_of_dropped(weights: Sequence[WeightCandidates], kv: Sequence[Sequence[KVCandidate]]) -> tuple[Requires, ...]:
    """A layer holds no keys and values only where the matrix that ends its attention is dropped."""
    ends = {row.site.layer: row for row in weights if row.site.role == "output"}
    links = []
    for row in kv:
        if nothing := frozenset(c.id for c in row if c.option == NOTHING):
            end = ends[row[0].site.layer]
            links.append(Requires(row[0].site.id, nothing, end.site.id, _dropping(end.shared)))
    return tuple(links)


def caches_follow(
    problem: Problem, kv: Mapping[str, Mapping[str, KVCandidate]], chosen: Sequence[int]
) -> tuple[int, ...]:
    """A solution whose layers hold no keys and values where they may go without, and keep them as they are where they may not."""
    ids, every = problem.describe(chosen), list(chosen)
    needed = {(link.group, id): link for link in problem.links for id in link.choices if link.group in kv}
    for g, group in enumerate(problem.groups):
        for i, choice in enumerate(group.choices):
            if (link := needed.get((group.id, choice.id))) is None:
                continue
            if ids[link.other_group] in link.other_choices:
                every[g] = i
            elif every[g] == i:
                every[g] = next(j for j, c in enumerate(group.choices) if kv[group.id][c.id].option.is_neutral)
    return tuple(every)


def dropped_together(rows: Sequence[WeightCandidates]) -> tuple[Requires, ...]:
    """A matrix before the end of a block is dropped only where that end is; where the end can't be, it can't be either."""
    offered = {shared: _dropping(shared) for shared in dict.fromkeys(row.shared for row in rows)}
    if not any(offered.values()):
        return ()
    dropped = {row.site: offered[row.shared] for row in rows}
    ends = {(site.layer, site.expert, site.role): site for site in dropped}
    links = []
    for site, choices in dropped.items():
        if choices and site.role in _END_OF:
            end = ends.get((site.layer, site.expert, _END_OF[site.role]))
            links.append(
                Requires(site.id, choices, end.id, dropped[end])
                if end is not None
                else Requires(site.id, choices, site.id, frozenset())
            )
    return tuple(links)
