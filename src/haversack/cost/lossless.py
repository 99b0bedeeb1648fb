"""Options that lose nothing, where the weights' own values leave room for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from haversack.cost.damage import NONE, Damage
from haversack.describe.assemble import read_site
from haversack.describe.checkpoint import Checkpoint, require_finite
from haversack.describe.model import Model
from haversack.describe.site import WeightSite
from haversack.parts.weights.base import WeightOption
from haversack.recipes.base import candidate_options

LEAST_SHARE = 0.5
"""No matrix of trained weights was seen to be coded in less of its 16-bit bytes: 8 bits of sign and mantissa stay."""


def lossless_damages(
    model: Model, recipes: tuple[str, ...] = (), progress: Callable[[str, int, int], None] | None = None
) -> dict[str, dict[WeightOption, Damage]]:
    """By site id: as it is, and the code of fewest bytes that holds the matrix. Reads every weight once."""
    assert model.folder is not None, "codes are chosen by the weights themselves"
    tell = progress or (lambda what, done, total: None)
    codes = [option for option in candidate_options("weights", recipes) if option.code is not None]
    if not codes:
        return {site.id: {WeightOption(): NONE} for site in model.weights}
    checkpoint = Checkpoint.open(model.folder)
    out: dict[str, dict[WeightOption, Damage]] = {}
    for done, site in enumerate(model.weights):
        tell("looking for room without loss", done, len(model.weights))
        weight = require_finite(read_site(checkpoint, site), site.id)
        option = holding(codes, site, weight)
        out[site.id] = {WeightOption(): NONE} | ({} if option is None else {option: NONE})
    tell("looking for room without loss", len(model.weights), len(model.weights))
    return out


def holding(options: Sequence[WeightOption], site: WeightSite, weight: torch.Tensor) -> WeightOption | None:
    """The code of fewest bytes that holds a site's matrix, or None where none does."""
    for option in sorted(options, key=lambda o: o.stored_bytes(site.out_features, site.in_features, site.dtype)):
        if option.code is not None and option.code.dtype == site.dtype and option.code.holds(weight):
            return option
    return None


def without_loss(damages: Mapping[str, Mapping[WeightOption, Damage]]) -> dict[str, dict[WeightOption, Damage]]:
    """The options of a table that keep every bit."""
    return {site: {o: damage for o, damage in row.items() if o.lossless} for site, row in damages.items()}
