"""Curves of a run as one self-contained page that renews itself while the run goes on: loss, learning rate, gradients, memory."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from haversack.formats.output import write_whole
from haversack.report.lines import Line, line_chart
from haversack.report.page import DARK, LIGHT
from haversack.units import format_bytes, format_seconds

MAX_POINTS = 600
"""Of a curve: longer ones show the mean of each stretch."""

REFRESH_SECONDS = 5
"""The page asks for itself again so often, and is written at most so often."""


class CurvesPage:
    """Writes the page from a run's rows, now and then."""

    def __init__(self, file: Path, title: str, lead: str, *, predicted_peak_bytes: int, budget_bytes: int | None):
        self.file = file
        self.title = title
        self.lead = lead
        self.predicted_peak_bytes = predicted_peak_bytes
        self.budget_bytes = budget_bytes
        self._written = -math.inf

    def update(self, rows: Sequence[Mapping[str, Any]], *, finished: bool = False) -> None:
        """Write the page whole, unless it was just written; `finished` always writes, a last time."""
        if not finished and time.monotonic() - self._written < REFRESH_SECONDS:
            return
        write_whole(self.file, self.render(rows, finished=finished))
        self._written = time.monotonic()

    def render(self, rows: Sequence[Mapping[str, Any]], *, finished: bool) -> str:
        """The page as text."""
        import jinja2

        template = resources.files("haversack.report").joinpath("curves.html.jinja").read_text(encoding="utf-8")
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
        return environment.from_string(template).render(
            title=self.title,
            lead=self.lead,
            light=LIGHT,
            dark=DARK,
            refresh=None if finished else REFRESH_SECONDS,
            charts=self._charts(rows),
            facts=_facts(rows),
            events=[row for row in rows if "event" in row],
        )

    def _charts(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
        pairs = any("preferred" in row for row in rows)
        charts = [
            (
                "Loss per pair" if pairs else "Loss, nats per token",
                line_chart("Loss", [_line(rows, "loss", "training"), _line(rows, "eval_loss", "held back")]),
            )
        ]
        if pairs:
            shares = [_line(rows, "preferred", "training"), _line(rows, "eval_preferred", "held back")]
            charts.append(("Share of pairs whose chosen answer is preferred", line_chart("Preferred", shares)))
        charts.append(
            ("Gradient norm before clipping", line_chart("Gradient norm", [_line(rows, "grad_norm", "gradient norm")]))
        )
        charts.append(("Learning rate", line_chart("Learning rate", [_line(rows, "learning_rate", "learning rate")])))
        marks = {"predicted peak": self.predicted_peak_bytes / 2**20}
        if self.budget_bytes:
            marks["budget"] = self.budget_bytes / 2**20
        held = _line(
            [{**r, "mib": r["private_bytes"] / 2**20} for r in rows if "private_bytes" in r], "mib", "after each step"
        )
        charts.append(("Private memory, MiB", line_chart("Private memory", [held], marks=marks)))
        return charts


def _line(rows: Sequence[Mapping[str, Any]], name: str, label: str) -> Line:
    points = [(float(row["step"]), float(row[name])) for row in rows if name in row and math.isfinite(row[name])]
    size = max(1, -(-len(points) // MAX_POINTS))
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    return Line(label, tuple((s[-1][0], sum(y for _, y in s) / len(s)) for s in stretches))


def _facts(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    steps = [row for row in rows if "loss" in row]
    if not steps:
        return []
    last = steps[-1]
    facts = [("step", f"{last['step']:,}"), ("loss", f"{last['loss']:.4f}")]
    evaluated = [row["eval_loss"] for row in rows if "eval_loss" in row]
    if evaluated:
        facts.append(("loss on rows held back", f"{evaluated[-1]:.4f}"))
    facts.append(("seconds per step", format_seconds(sorted(r["seconds"] for r in steps)[len(steps) // 2])))
    facts.append(("most private memory after a step", format_bytes(max(row["private_bytes"] for row in steps))))
    return facts
