"""Damage of every site with any number of the blocks of its stack: proxies from calibration, on a sample of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from haversack._version import __version__
from haversack.cost.calibrated import Calibration, DamageTable, Weigher, option_key
from haversack.describe.assemble import read_site
from haversack.describe.checkpoint import Checkpoint, require_finite
from haversack.parts.weights.base import WeightOption

_VERSION = 1
"""Counts changes of how these damages are found."""


def stack_damages(
    calibration: Calibration, option: WeightOption, progress: Callable[[str, int, int], None]
) -> dict[str, tuple[float, ...]]:
    """By site id, nats per token with the fewest blocks of `option`'s stack, with one more, and so on to all of them.

    Kept beside the calibration and resumed site by site. Sites that no product reached have no statistics, and are left out.
    """
    model, statistics = calibration.model, calibration.statistics
    assert model.folder is not None and option.stack is not None
    checkpoint = Checkpoint.open(model.folder)
    table = DamageTable(statistics.folder / f"stacks-{__version__}-{_VERSION}.jsonl")
    found: dict[str, tuple[float, ...]] = {}
    for done, site in enumerate(model.weights):
        progress("weighing blocks", done, len(model.weights))
        if site.id not in statistics:
            continue
        key = option_key(site.id, option)
        if key not in table.rows:
            weight = require_finite(read_site(checkpoint, site), site.id).float()
            table.add(key, Weigher(site, weight, statistics[site.id]).prefix_damages(option))
        found[site.id] = tuple(table.rows[key])
    progress("weighing blocks", len(model.weights), len(model.weights))
    return found


def order_of_blocks(
    damages: Mapping[str, tuple[float, ...]], block_bytes: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """Sites in the order in which their next block is taken: always the one that spares most damage per byte.

    A block that spares little before one that spares much is taken for the sake of the next: runs of blocks are judged by
    their mean, so that the order follows each site's convex hull. `block_bytes` are of the blocks beyond the floor.
    """
    runs: list[tuple[float, str, int]] = []
    for site, nats in damages.items():
        sizes, first = block_bytes[site], 0
        while first < len(sizes):
            gains = [
                (nats[first] - nats[last]) / max(1, sum(sizes[first:last])) for last in range(first + 1, len(nats))
            ]
            best = max(range(len(gains)), key=lambda i: gains[i])
            runs.append((gains[best], site, best + 1))
            first += best + 1
    runs.sort(key=lambda run: -run[0])  # stable, and each site's runs gain less and less
    return tuple(site for _, site, number in runs for _ in range(number))
