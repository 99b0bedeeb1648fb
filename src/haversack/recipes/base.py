"""What a recipe is, and where they are found.

A recipe names options as a paper does. Each module of this package that holds a module-level `RECIPE` is one; nothing lists
them by hand. The planner's candidates are the union of the options of all recipes that are `candidates`.
"""

from __future__ import annotations

import difflib
import importlib
import json
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from haversack.describe.workload import LIKELIHOOD
from haversack.errors import UsageError
from haversack.parts.base import Part, Source, all_parts
from haversack.parts.loss.preference import Preference
from haversack.parts.optimizer.base import OptimizerOption

if TYPE_CHECKING:
    from haversack.parts.kv.base import KVOption
    from haversack.recipes.allocation import Allocation, Chosen
    from haversack.recipes.cache_budget import CacheBudget


@dataclass(frozen=True)
class Setting:
    """One choice of a tuning or training workload, as `--with` takes it: what recipes of activations and adaptation are."""

    name: str
    value: str

    def to_dict(self) -> dict[str, str]:
        return {self.name: self.value}


@dataclass(frozen=True)
class Recipe:
    """A named composition.

    `options` builds the options (`WeightOption`, `KVOption`, `Placement`, `OptimizerOption`, `Setting`) that the recipe offers for its
    resident, from fewest to most bytes; an optimizer's recipe has one, which is chosen by the recipe's id. `published` is the paper's own figure, in one sentence. `catalogue` holds the ids that it makes
    true. `candidates` says whether the planner tries the options unasked: weighing costs time per option and site, so that
    those which another recipe beats at equal bytes stay out. `whole_cache`, of KV recipes, gives every layer an option so
    that the cache stays within a byte budget; with `needs_statistics` it asks for measurements on the model. `choose`, of
    choosers, gives every matrix one of the options that are offered: the recipe's own, or where it has none all there are.
    """

    id: str
    resident: str
    title: str
    source: Source
    options: Callable[[], tuple[Any, ...]]
    published: str = ""
    catalogue: tuple[str, ...] = ()
    candidates: bool = True
    whole_cache: Callable[[CacheBudget], tuple[KVOption, ...]] | None = None
    needs_statistics: bool = False
    choose: Callable[[Allocation], Chosen] | None = None


@cache
def all_recipes() -> dict[str, Recipe]:
    """Every recipe by id."""
    import haversack.recipes as package

    found: dict[str, Recipe] = {}
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        recipe = getattr(importlib.import_module(module.name), "RECIPE", None)
        if isinstance(recipe, Recipe):
            assert recipe.id not in found, f"two recipes share the id {recipe.id!r}"
            found[recipe.id] = recipe
    return dict(sorted(found.items()))


@cache
def candidate_options(resident: str, recipes: tuple[str, ...] = ()) -> tuple[Any, ...]:
    """All distinct options offered to the planner for a resident: those of the named recipes where any has some, else of
    every recipe that is a candidate."""
    distinct: dict[str, Any] = {}
    every = [recipe for recipe in all_recipes().values() if recipe.resident == resident]
    named = [recipe for recipe in every if recipe.id in recipes and recipe.options()]
    for recipe in named or every:
        if named or recipe.candidates:
            for option in recipe.options():
                distinct.setdefault(json.dumps(option.to_dict(), sort_keys=True), option)
    return tuple(distinct.values())


def optimizer_names() -> tuple[str, ...]:
    """Ids of the optimizers' recipes: what a workload's `optimizer` may be."""
    return tuple(recipe.id for recipe in all_recipes().values() if recipe.resident == "optimizer")


def optimizer_option(name: str) -> OptimizerOption:
    """The option of the optimizer `name`. Raises UsageError naming all there are."""
    names = optimizer_names()
    if name not in names:
        raise UsageError(f"optimizer is {name!r}, but must be one of {', '.join(names)}.")
    (option,) = all_recipes()[name].options()
    return option


@cache
def preferences() -> dict[str, Preference]:
    """Losses over pairs of answers, by the recipe that a workload's `objective` may name."""
    found: dict[str, Preference] = {}
    for recipe in all_recipes().values():
        if recipe.resident == "loss":
            for option in recipe.options():
                if isinstance(option, Preference):
                    found[recipe.id] = option
    return found


def preference(objective: str) -> Preference | None:
    """The loss over pairs that an `objective` names; None where tokens are predicted. Raises UsageError naming all there are."""
    if objective == LIKELIHOOD:
        return None
    if objective not in preferences():
        raise UsageError(f"the loss is {objective!r}, but must be one of {', '.join([LIKELIHOOD, *preferences()])}.")
    return preferences()[objective]


def any_named(resident: str, recipes: Sequence[str]) -> bool:
    """Whether one of these ids is a recipe for the resident that offers options."""
    return any(r.resident == resident and r.id in recipes and r.options() for r in all_recipes().values())


def check_recipes(ids: Sequence[str], residents: Sequence[str]) -> None:
    """Raise a UsageError naming the first id that is no recipe for one of these residents, with what was meant or may be had."""
    known = {recipe.id: recipe.resident for recipe in all_recipes().values()}
    able = [name for name, resident in known.items() if resident in residents]
    for name in ids:
        if name in able:
            continue
        if name in known:
            raise UsageError(
                f"recipe {name!r} is for {known[name]}, but only {' and '.join(residents)} are planned here."
            )
        near = difflib.get_close_matches(name, able, 1, 0.5)
        way = (
            f"did you mean {near[0]!r}?" if near else f"`haversack methods` lists {len(able)}, {able[0]} to {able[-1]}."
        )
        raise UsageError(f"there is no recipe {name!r}; {way}")


@cache
def catalogue() -> dict[str, dict[str, Any]]:
    """The field's systems by id, as shipped with the package."""
    text = resources.files("haversack.recipes").joinpath("catalogue.jsonl").read_text(encoding="utf-8")
    entries = [json.loads(line) for line in text.splitlines() if line.strip()]
    return {entry["id"]: entry for entry in entries}


def list_methods() -> list[dict[str, Any]]:
    """What `haversack methods --json` prints: one row per part and per recipe."""
    rows: list[dict[str, Any]] = []
    things: list[tuple[str, type[Part] | Recipe]] = [("part", part) for part in all_parts().values()]
    things += [("recipe", recipe) for recipe in all_recipes().values()]
    for kind, thing in things:
        source = thing.source
        rows.append(
            {
                "id": thing.id,
                "kind": kind,
                "resident": thing.resident,
                "title": thing.title,
                "source": {"authors": source.authors, "year": source.year, "arxiv": source.arxiv} if source else None,
                "catalogue": list(thing.catalogue),
            }
        )
    return rows
