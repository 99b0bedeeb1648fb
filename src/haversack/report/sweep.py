"""The picture of a sweep: a bar of bytes by owner for each value, against the budget."""

from __future__ import annotations

from collections.abc import Sequence

from haversack.plan.sweep import SweepPoint
from haversack.report.charts import Bar, stacked_bars, stand_alone
from haversack.report.page import LIGHT


def sweep_picture(points: Sequence[SweepPoint], unit: str, budget_bytes: int | None) -> str:
    """An SVG file of its own."""
    owners = list(dict.fromkeys(owner for point in points for owner in point.owners))
    bars = [Bar(f"{point.value:,}", unit, point.owners) for point in points]
    return stand_alone(stacked_bars(bars, owners, budget_bytes), owners, LIGHT)
