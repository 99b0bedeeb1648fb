"""Recipes of activations and adaptation are settings that a workload has."""

from __future__ import annotations

import dataclasses

import pytest

from haversack.describe.workload import TuneWorkload
from haversack.recipes.base import Recipe, Setting, all_recipes

SETTINGS = [recipe for recipe in all_recipes().values() if recipe.resident in ("activations", "adaptation")]


@pytest.mark.parametrize("recipe", SETTINGS, ids=lambda recipe: recipe.id)
def test_a_recipe_is_one_setting_that_is_no_default(recipe: Recipe) -> None:
    (setting,) = recipe.options()
    assert isinstance(setting, Setting)
    workload = dataclasses.replace(TuneWorkload(1, 8, method="full"), **setting.to_dict())
    assert getattr(workload, setting.name) == setting.value
    assert f"{setting.name}={setting.value}" in recipe.title or f"--{setting.name} {setting.value}" in recipe.title
