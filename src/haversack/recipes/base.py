"""What a recipe is, and where they are found.

A recipe names options as a paper does. Each module of this package that holds a module-level `RECIPE` is one; nothing lists
them by hand. The planner's candidates are the union of the options of all recipes that are `candidates`.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from haversack.errors import UsageError
from haversack.parts.base import Part, Source, all_parts
from haversack.parts.optimizer.base import OptimizerOption


@dataclass(frozen=True)
class Recipe:
    """A named composition.

    `options` builds the options (`WeightOption`, `KVOption`, `Placement`, `OptimizerOption`) that the recipe offers for its
    resident, from fewest to most bytes; an optimizer's recipe has one, which is chosen by the recipe's id. `published` is the paper's own figure, in one sentence. `catalogue` holds the ids that it makes
    true. `candidates` says whether the planner tries the options unasked: weighing costs time per option and site, so that
    those which another recipe beats at equal bytes stay out.
    """

    id: str
    resident: str
    title: str
    source: Source
    options: Callable[[], tuple[Any, ...]]
    published: str = ""
    catalogue: tuple[str, ...] = ()
    candidates: bool = True


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
def candidate_options(resident: str) -> tuple[Any, ...]:
    """All distinct options that recipes offer to the planner for a resident."""
    distinct: dict[str, Any] = {}
    for recipe in all_recipes().values():
        if recipe.resident == resident and recipe.candidates:
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
