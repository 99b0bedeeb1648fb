"""The option of keeping what a quantized checkpoint stores: offered wherever its integers lie on a grid that kernels have."""

from __future__ import annotations

from collections.abc import Mapping

from haversack.cost.damage import Damage
from haversack.describe.assemble import stored_grid
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.model import Model
from haversack.describe.stored_form import SMALL_GROUP_SIZES, StoredGrid
from haversack.parts.weights.as_stored import AsStored
from haversack.parts.weights.base import Grid, WeightOption
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.integer import IntegerGrid

KEPT = Damage(0.0, "measured", 0.0, 0.0, "the checkpoint's own codes, bit for bit")


def stored_options(model: Model) -> dict[str, WeightOption]:
    """By site id, for matrices whose codes can be kept. Reads scales and zero points of a quantized checkpoint, once."""
    if model.folder is None or not model.quantized:
        return {}
    if not _found or _found[0][0] is not model:
        checkpoint = Checkpoint.open(model.folder)
        grids = {site.id: stored_grid(checkpoint, site) for site in model.weights}
        options = {
            site: WeightOption(grid=_grid(grid), rounding=AsStored())
            for site, grid in grids.items()
            if grid is not None
        }
        _found[:] = [(model, options)]
    return _found[0][1]


def _grid(stored: StoredGrid) -> Grid:
    """The grid of ours that a checkpoint's integers lie on."""
    if stored.group_size in SMALL_GROUP_SIZES:
        return CodebookGrid(f"int{stored.bits}", stored.group_size)
    return IntegerGrid(stored.bits, stored.group_size, stored.symmetric)


_found: list[tuple[Model, dict[str, WeightOption]]] = []
"""The model asked about last: a plan asks several times, and scales are a sixteenth of the weights' bytes."""


def with_stored(
    damages: Mapping[str, Mapping[WeightOption, Damage]], model: Model
) -> dict[str, dict[WeightOption, Damage]]:
    """A table of damages with the option of keeping codes, which loses nothing, wherever there is one. Sites that shared
    a table share one still."""
    options = stored_options(model)
    shared: dict[tuple[int, WeightOption | None], dict[WeightOption, Damage]] = {}
    out = {}
    for site, table in damages.items():
        option = options.get(site)
        key = (id(table), option)
        if key not in shared:
            shared[key] = dict(table) | ({} if option is None else {option: KEPT})
        out[site] = shared[key]
    return out
