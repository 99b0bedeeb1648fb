"""What goes with a dropped matrix: where the one that ends a block is dropped, those before it cost nothing more to drop."""

from __future__ import annotations

from collections.abc import Sequence

from haversack.cost.candidates import WeightCandidates
from haversack.cost.damage import Damage
from haversack.describe.site import WeightSite
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.dropped import DroppedGrid
from haversack.solve.problem import Requires

_END_OF = {"query": "output", "key": "output", "value": "output", "qkv": "output", "gate": "down", "up": "down"}
"""Role of the matrix that ends a block, by those of the matrices before it."""


def _is_dropped(option: WeightOption) -> bool:
    return isinstance(option.grid, DroppedGrid) and not option.corrections


def follows_for_free(site: WeightSite, option: WeightOption) -> Damage | None:
    """The damage of dropping a matrix that stands before the end of its block, None of any other choice."""
    if _is_dropped(option) and site.role in _END_OF:
        return Damage(0.0, "proxied", source="dropped only with the end of its block, whose damage holds all")
    return None


def dropped_together(rows: Sequence[WeightCandidates]) -> tuple[Requires, ...]:
    """A matrix before the end of a block is dropped only where that end is; where the end can't be, it can't be either."""
    offered = {
        row.shared: frozenset(id for id, cost in row.shared.rows.items() if _is_dropped(cost.option)) for row in rows
    }
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
