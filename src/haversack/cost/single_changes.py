"""Damage of single options measured: KL of the model with one site changed, for the options that could be chosen there.

The stage between proxies and whole plans. At every site, options that another beats in bytes and proxied damage drop
out; of the survivors one after another is measured from cached layer inputs (`engine.downstream`), every site in turn, so
that a stage cut short by its time limit has measured each site about equally often. What was not measured keeps its
proxy, corrected by the ratio that its measured neighbours at the site have to theirs, and its label.

Rows are kept as they come; a stage that ended, by finishing or by time, is not taken up again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Protocol

import torch

from haversack.cost.damage import Damage
from haversack.describe.assemble import read_site
from haversack.describe.model import Model
from haversack.describe.site import WeightSite
from haversack.engine.layers import StreamedModel
from haversack.engine.site_statistics import SiteStatistics
from haversack.parts.kv.base import KVOption
from haversack.parts.weights.base import WeightOption

MAX_SECONDS, MAX_SMALL_SECONDS = 300.0, 120.0
"""For the weights' stage and for the caches', each; the second for models up to `SMALL_MODEL_PARAMETERS`."""

MAX_SURVIVORS = 6
"""Options measured at a site; a longer front is thinned evenly."""

SMALL_MODEL_PARAMETERS = 100_000_000
"""Up to here changes are measured in float32 and on 2,048 tokens, and whole plans unless told not to; above in the model's
own dtype, whose rounding hides what 8 bits lose, and on half as many."""

LEAST_NATS = 1e-5
"""Options that a proxy puts below are not measured: nothing depends on them."""

SOURCE = "KL of the model with this site alone changed"

Progress = Callable[[str, int, int], None]


class Rows(Protocol):
    """Finished rows, kept on disk: key -> value."""

    rows: dict

    def add(self, key: str, value: object) -> None: ...


def _bytes_at(site: WeightSite) -> Callable[[WeightOption], int]:
    return lambda option: option.stored_bytes(site.out_features, site.in_features, site.dtype)


def survivors(proxies: Mapping[WeightOption, Damage], bytes_of: Callable[[WeightOption], int]) -> list[WeightOption]:
    """Options that none beats in bytes and damage at once, in the order in which they are measured: the middle one, the
    smallest, the largest, then what lies between."""
    front: list[WeightOption] = []
    for option in sorted(proxies, key=lambda o: (bytes_of(o), proxies[o].nats or 0.0)):
        nats = proxies[option].nats or 0.0
        if not option.is_neutral and nats > LEAST_NATS and (not front or nats < (proxies[front[-1]].nats or 0.0)):
            front.append(option)
    if len(front) > MAX_SURVIVORS:
        front = [front[i * (len(front) - 1) // (MAX_SURVIVORS - 1)] for i in range(MAX_SURVIVORS)]
    order: list[WeightOption] = []
    for place in (len(front) // 2, 0, len(front) - 1, *range(len(front))):
        if front and front[place] not in order:
            order.append(front[place])
    return order


def measure_weight_options(
    model: StreamedModel,
    token_ids: torch.Tensor,
    statistics: Mapping[str, SiteStatistics],
    proxies: Mapping[str, Mapping[WeightOption, Damage]],
    rows: Rows,
    key: Callable[[str, WeightOption], str],
    scratch: Path,
    tell: Progress,
) -> dict[str, dict[WeightOption, Damage]]:
    """The damages, with those of the survivors measured and the others corrected by them."""
    from haversack.engine.downstream import Downstream, MatrixChange

    described = model.described
    wanted = {
        site.id: survivors(proxies[site.id], _bytes_at(site)) for site in described.weights if site.id in statistics
    }
    layers = [*reversed(range(described.num_layers)), None]
    batches = [
        [
            (site, wanted[site.id][place])
            for site in described.weights
            if site.layer == layer and len(wanted.get(site.id, ())) > place
        ]
        for place in range(max(map(len, wanted.values()), default=0))
        for layer in layers
    ]

    def matrix(site: WeightSite, option: WeightOption) -> torch.Tensor:
        task = statistics[site.id].task(read_site(model.checkpoint, site).float())
        return option.dense(option.encode(task), site.out_features, site.in_features)

    def measure(downstream: Downstream, batch: Sequence[tuple[WeightSite, WeightOption]]) -> dict[str, float]:
        changes = [MatrixChange(key(s.id, o), s, _once(partial(matrix, s, o))) for s, o in batch]
        return downstream.measure(changes)

    keyed = [{key(site.id, option): (site, option) for site, option in batch} for batch in batches]
    run_stage("weights", keyed, measure, model, token_ids, rows, scratch, tell)
    found = {
        site_id: {o: rows.rows[_row(key(site_id, o))] for o in table if _row(key(site_id, o)) in rows.rows}
        for site_id, table in proxies.items()
    }
    ratios = [ratio for site_id in proxies for _, ratio in _log_ratios(proxies[site_id], found[site_id])]
    elsewhere = median(ratios) if ratios else 0.0
    return {site_id: corrected(table, found[site_id], elsewhere) for site_id, table in proxies.items()}


def measure_cache_options(
    model: StreamedModel,
    token_ids: torch.Tensor,
    options: Sequence[KVOption],
    rows: Rows,
    key: Callable[[str, KVOption], str],
    scratch: Path,
    tell: Progress,
) -> None:
    """Every layer's cache under every option, alone: rows of the table; a stage cut short leaves some out."""
    from haversack.engine.downstream import CacheChange, Downstream

    sites = [site for site in model.described.attention if site.shares_with is None]
    batches = [{key(site.id, option): (site, option)} for option in options for site in reversed(sites)]

    def measure(downstream: Downstream, batch: Sequence[tuple]) -> dict[str, float]:
        return downstream.measure([CacheChange(key(site.id, option), site, option) for site, option in batch])

    run_stage("caches", batches, measure, model, token_ids, rows, scratch, tell)


def corrected(
    table: Mapping[WeightOption, Damage], measured: Mapping[WeightOption, float], elsewhere: float = 0.0
) -> dict[WeightOption, Damage]:
    """Measured damages where there are some; the other proxies times their measured neighbours' ratio, interpolated in the
    logarithm of the proxy, or where the site has none times `exp(elsewhere)`, so that sites stay comparable. A
    divergence below `LEAST_NATS` is not told from rounding, and corrects nothing."""
    known = _log_ratios(table, measured)
    out = {}
    for option, damage in table.items():
        if measured.get(option, 0.0) > LEAST_NATS:
            out[option] = Damage(measured[option], "measured", source=SOURCE)
        elif damage.nats and (known or elsewhere):
            ratio = _interpolated(known, math.log(damage.nats)) if known else elsewhere
            where = "at the site" if known else "at other sites"
            source = f"{damage.source}, corrected by options measured {where}"
            out[option] = Damage(damage.nats * math.exp(ratio), damage.label, source=source)
        else:
            out[option] = damage
    return out


def _log_ratios(
    table: Mapping[WeightOption, Damage], measured: Mapping[WeightOption, float]
) -> list[tuple[float, float]]:
    """Logarithms of the proxy, and of what was measured over it, rising."""
    return sorted(
        (math.log(table[o].nats or 1e-30), math.log(nats / (table[o].nats or 1e-30)))
        for o, nats in measured.items()
        if nats > LEAST_NATS
    )


def _interpolated(points: Sequence[tuple[float, float]], x: float) -> float:
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / max(x1 - x0, 1e-12)
    return points[-1][1]


def run_stage(
    name: str,
    batches: Sequence[Mapping[str, tuple]],
    measure: Callable,
    model: StreamedModel,
    token_ids: torch.Tensor,
    rows: Rows,
    scratch: Path,
    tell: Progress,
    *,
    scored: Mapping[str, torch.Tensor] | None = None,
    max_seconds: float | None = None,
) -> None:
    """Measure batch after batch, until all are or its seconds have passed. `scored` are a probe's places (see `Downstream`)."""
    from haversack.engine.downstream import Downstream

    total = sum(map(len, batches))
    keys = json.dumps([sorted(batch) for batch in batches])
    ended = f"stage {name} {hashlib.sha256(keys.encode()).hexdigest()[:16]}"
    if total == 0 or ended in rows.rows:
        return
    what = f"measuring {name} site by site"
    limit = max_seconds or (MAX_SMALL_SECONDS if is_small(model.described) else MAX_SECONDS)
    started, done = time.monotonic(), 0
    tell(what, 0, total)
    downstream = Downstream(model, token_ids, scratch, scored)
    for batch in batches:
        missing = {k: pair for k, pair in batch.items() if _row(k) not in rows.rows}
        if missing and time.monotonic() - started > limit:
            break
        if missing:
            for k, nats in measure(downstream, list(missing.values())).items():
                rows.add(_row(k), nats if isinstance(nats, dict) else max(0.0, nats))
        done += len(batch)
        tell(what, done, total)
    rows.add(ended, f"{done} of {total}")
    downstream.close()


def _row(key: str) -> str:
    return f"KL {key}"


def _once(make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A change outside the layers is asked for more than once: at the embedding and at every piece of the head."""
    kept: list[torch.Tensor] = []

    def get() -> torch.Tensor:
        if not kept:
            kept.append(make())
        return kept[0]

    return get


def stage_model(described: Model) -> StreamedModel:
    """The model that changes are measured on."""
    return StreamedModel.open(described, torch.float32 if is_small(described) else None)


def is_small(described: Model) -> bool:
    """Whether a whole forward pass is cheap."""
    return described.num_parameters <= SMALL_MODEL_PARAMETERS
