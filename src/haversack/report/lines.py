"""Curves over steps as inline SVG, in the page's colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 720, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 22, 26


@dataclass(frozen=True)
class Line:
    """One curve: its label and its points (step, value)."""

    label: str
    points: tuple[tuple[float, float], ...]


def line_chart(title: str, lines: Sequence[Line], *, marks: Mapping[str, float] | None = None) -> str:
    """Curves over the same steps; `marks` are dashed lines across at a value. Empty where there is no point yet."""
    drawn = [line for line in lines if line.points]
    if not drawn:
        return ""
    values = [y for line in drawn for _, y in line.points] + list((marks or {}).values())
    last = max(x for line in drawn for x, _ in line.points)
    first = min(x for line in drawn for x, _ in line.points)
    ticks = nice_ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def x_of(step: float) -> float:
        return _LEFT + (step - first) / max(1e-9, last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{escape(title)}</title>']
    for tick in ticks:
        y = y_of(tick)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" class="quiet">{tick:g}</text>')
    for step, anchor in ((first, "start"), (last, "end")):
        parts.append(
            f'<text x="{x_of(step):.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}" class="quiet">step {step:g}</text>'
        )
    for label, value in (marks or {}).items():
        y = y_of(value)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="mark"/>')
        parts.append(
            f'<text x="{_WIDTH - _RIGHT}" y="{y - 4:.1f}" text-anchor="end" class="mark-label">{escape(label)} {value:,.0f}</text>'
        )
    x = float(_LEFT)
    for number, line in enumerate(drawn):
        path = " ".join(f"{x_of(step):.1f},{y_of(value):.1f}" for step, value in line.points)
        colour = f"var(--c{number})"
        if len(line.points) == 1:
            at = path.split(",")
            parts.append(f'<circle cx="{at[0]}" cy="{at[1]}" r="3" fill="{colour}"/>')
        parts.append(
            f'<polyline points="{path}" class="curve" stroke="{colour}"><title>{escape(line.label)}: last {line.points[-1][1]:.4g}'
            "</title></polyline>"
        )
        parts.append(f'<text x="{x:.0f}" y="12"><tspan fill="{colour}">&#9632;</tspan> {escape(line.label)}</text>')
        x += 7 * len(line.label) + 40
    return "".join(parts) + "</svg>"


def nice_ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that begin at or below `low` and end at or above `high`."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]
