"""Plans by published choosers: which option each matrix gets is theirs to say, everything else follows as for any plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from haversack.cost.dropped import caches_follow, is_dropped
from haversack.cost.serving import ServingProblem
from haversack.cost.single_changes import stage_model
from haversack.engine.layer_change import layer_changes
from haversack.errors import UsageError
from haversack.plan.refine import PlanMeter
from haversack.recipes.allocation import Allocation, AllocationSite, Choice, Chosen, front
from haversack.recipes.base import all_recipes
from haversack.solve.exact import Solution
from haversack.solve.problem import as_tuple

_TRIES = 4
"""A chooser knows stored bytes alone: where workspaces grow beyond the budget it is asked again with that much less."""


def choose_by(recipe_id: str, built: ServingProblem, solution: Solution, meter: PlanMeter) -> Solution:
    """The solution with its weights chosen by a recipe, its caches as they are.

    Raises UsageError for a recipe that is no chooser, or one whose choice does not fit.
    """
    recipe = all_recipes().get(recipe_id)
    if recipe is None or recipe.choose is None:
        choosers = ", ".join(r.id for r in all_recipes().values() if r.choose is not None)
        raise UsageError(f"{recipe_id!r} chooses no plan; name one of {choosers}.")
    capacity = built.problem.capacity_bytes.get("device")
    if capacity is None:
        raise UsageError(f"{recipe_id} shares a budget among the weights, and none was given; state one.")
    question = _Weights(built, solution, meter)
    room = capacity - solution.evaluation.peak_bytes["device"] + question.num_bytes(solution.chosen)
    excess = 0
    for _ in range(_TRIES):
        room -= excess
        chosen = question.whole(recipe.choose(question.allocation(room)))
        evaluation = built.problem.evaluate(chosen)
        if evaluation.feasible:
            return replace(solution, chosen=chosen, evaluation=evaluation)
        excess = max(1, evaluation.excess_bytes.get("device", 0))
    raise UsageError(
        f"{recipe_id} finds no choice within {capacity} bytes; raise the budget, or let the planner choose."
    )


_LEAST = 1e-12
"""Nats of a matrix that is dropped for free with the end of its block, so that keeping it is a choice of its own."""


class _Weights:
    """The weights' groups of a problem as sites with choices, the other groups as a solution has them, but for the caches of
    dropped attention."""

    def __init__(self, built: ServingProblem, solution: Solution, meter: PlanMeter):
        self.built, self.solution, self.meter = built, solution, meter
        self.num_measured = 0
        self.groups = [g for g, group in enumerate(built.problem.groups) if group.id in built.weights]
        self.sites: list[AllocationSite] = []
        self.places: list[list[int]] = []  # of each site's choices in its group
        for g in self.groups:
            group = built.problem.groups[g]
            candidates = [built.weights[group.id][choice.id] for choice in group.choices]
            damages = [as_tuple(choice.damage)[0] for choice in group.choices]
            offered = [
                Choice(choice.id, c.stored_bytes, max(_LEAST if is_dropped(c.option) else 0.0, damage))
                for choice, c, damage in zip(group.choices, candidates, damages, strict=True)
            ]
            kept, site = front(offered), candidates[0].site
            self.sites.append(AllocationSite(site.id, site.layer, site.num_parameters, kept))
            self.places.append([offered.index(choice) for choice in kept])

    def allocation(self, capacity_bytes: int) -> Allocation:
        return Allocation(tuple(self.sites), capacity_bytes, self._measure, self._layer_change)

    def whole(self, chosen: Chosen) -> tuple[int, ...]:
        """One index per group."""
        every = list(self.solution.chosen)
        for g, places, i in zip(self.groups, self.places, chosen, strict=True):
            every[g] = places[i]
        return caches_follow(self.built.problem, self.built.kv, every)

    def num_bytes(self, chosen: Sequence[int]) -> int:
        groups = self.built.problem.groups
        return sum(self.built.weights[groups[g].id][groups[g].choices[chosen[g]].id].stored_bytes for g in self.groups)

    def _measure(self, chosen: Chosen) -> float:
        self.meter.progress("measuring choices", self.num_measured, 0)
        self.num_measured += 1
        return as_tuple(self.meter.measure(self.built, self.whole(chosen)))[0]

    def _layer_change(self) -> dict[int, float]:
        calibration = self.meter.calibration
        changes = layer_changes(stage_model(calibration.model), calibration.windows.search)
        return {layer: change.whole for layer, change in enumerate(changes)}
