"""The damage of every option at every site: from calibration where there is some, else from what was published.

Published figures are of whole models with all linears at one setting. A site gets its share by its number of weights, so that a plan
that follows the published setting everywhere sums to the published figure, and a mixed plan lies between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from haversack.cost.as_stored import with_stored
from haversack.cost.damage import NONE, Damage, cited_weight_damages, worst_label
from haversack.describe.model import Model
from haversack.describe.site import AttentionSite, WeightSite
from haversack.parts.kv.base import KVOption
from haversack.parts.weights.base import WeightOption
from haversack.solve.problem import as_tuple

UNKNOWN_ORDER = {8: 1e-4, 4: 1e-2, 3: 0.1, 2: 1.0}
"""Order among options whose damage nobody published, in nats for a whole model: it ranks them for the solver and is never
shown as a figure."""


def cited_damages(
    model: Model, site: WeightSite, options: Sequence[WeightOption], *, asked_for: bool = False
) -> dict[WeightOption, Damage]:
    """The site's share of published figures, for options that somebody measured; others are left out, but for those
    that were asked for: their damage is unknown.

    Embedding and head stay neutral or at 8 bits: the published rows leave them at 16 bits.
    """
    linears = sum(s.num_parameters for s in model.weights if s.role not in _OUTSIDE)
    share = site.num_parameters / max(1, linears)
    out: dict[WeightOption, Damage] = {WeightOption(): NONE}
    for option in options:
        setting = _setting(option)
        if asked_for and option.grid is not None:
            out[option] = Damage(
                UNKNOWN_ORDER[option.grid.bits] * site.num_parameters / model.num_parameters, "unknown"
            )
        if setting is None:
            continue
        bits, group_size, rounding, symmetric = setting
        if site.role in _OUTSIDE:
            if bits == 8 and group_size == 128 and symmetric and rounding == "nearest":
                whole_share = site.num_parameters / model.num_parameters
                out[option] = Damage(UNKNOWN_ORDER[8] * whole_share, "unknown")
            continue
        for row, whole in cited_weight_damages():
            if row["bits"] != bits or row["rounding"] != rounding or symmetric != (bits == 8):
                continue
            if bits != 8 and row["group_size"] != group_size:
                continue
            assert whole.nats is not None and whole.low is not None and whole.high is not None
            out[option] = Damage(
                whole.nats * share, "cited", max(0.0, whole.low) * share, whole.high * share, whole.source
            )
    return out


_OUTSIDE = ("embedding", "position", "head")


def _setting(option: WeightOption) -> tuple[int, int, str, bool] | None:
    if option.grid is None or option.rounding is None or option.transforms or option.corrections:
        return None
    fields = option.grid.to_dict()
    if fields.get("activation_bits", 16) != 16 or "bits" not in fields:
        return None
    return fields["bits"], fields["group_size"], option.rounding.id, fields.get("symmetric", True)


def unknown_kv_damages(model: Model, site: AttentionSite, options: Sequence[KVOption]) -> dict[KVOption, Damage]:
    """Nothing published is in nats: options are ordered by their bytes and labelled unknown; dropping tokens is not offered."""
    out: dict[KVOption, Damage] = {KVOption(): NONE}
    for option in options:
        fields = option.represent.to_dict()
        if option.score is None and "key_bits" in fields:
            order = (UNKNOWN_ORDER[fields["key_bits"]] + UNKNOWN_ORDER[fields["value_bits"]]) / 2
            out[option] = Damage(order / max(1, model.num_layers), "unknown")
    return out


def total_damage(parts: Sequence[Damage]) -> Damage:
    """The sum, under the worst label of its terms, and never *measured* where several were measured one by one: their sum
    was not. No figure where a term is unknown."""
    label = worst_label([part.label for part in parts])
    if label == "measured" and sum(bool(part.nats) for part in parts) > 1:
        label = "proxied"
    sources = "; ".join(dict.fromkeys(part.source for part in parts if part.source and part.nats))
    if label == "unknown":
        known = [part for part in parts if part.label != "unknown"]
        low = sum(part.low or 0.0 for part in known)
        return Damage(None, "unknown", low or None, None, sources)
    nats = sum(part.nats or 0.0 for part in parts)
    kinds = dict.fromkeys(kind for part in parts for kind, _ in part.probes)
    probes = tuple((kind, math.fsum(as_tuple(part.on([kind]))[1] for part in parts)) for kind in kinds)
    has_range = all(part.low is not None and part.high is not None for part in parts)
    low_sum = sum(part.low or 0.0 for part in parts) if has_range else None
    high_sum = sum(part.high or 0.0 for part in parts) if has_range else None
    return Damage(nats, label, low_sum, high_sum, sources, probes)


def damage_table(
    model: Model,
    options: Sequence[WeightOption],
    measured: Mapping[str, Mapping[WeightOption, Damage]] | None,
    *,
    asked_for: bool = False,
) -> dict[str, dict[WeightOption, Damage]]:
    """By site id: what calibration found, else what was published; `asked_for` says that a user named these options. Keeping
    a quantized checkpoint's codes is always offered."""
    if measured is not None:
        return with_stored({site.id: dict(measured[site.id]) for site in model.weights}, model)
    by_share: dict[tuple[bool, int], dict[WeightOption, Damage]] = {}  # sites of one share have one table
    table = {}
    for site in model.weights:
        key = (site.role in _OUTSIDE, site.num_parameters)
        if key not in by_share:
            by_share[key] = cited_damages(model, site, options, asked_for=asked_for)
        table[site.id] = by_share[key]
    return with_stored(table, model)
