"""The report's pictures, as inline SVG strings.

Colours are CSS variables of the page (`--c0` ...), so that one drawing serves light, dark and print. Every mark carries a
`<title>`: what a pointer shows, a reader that reads aloud says too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from haversack.units import format_bytes

_WIDTH = 720
_LEGEND_HEIGHT = 28
_VALUE_WIDTH = 66
"""Room of a bar's bytes in figures."""

_FIGURE_WIDTH = 26
"""A square this wide has room for its bits in figures, for those who see no colours and for print."""


@dataclass(frozen=True)
class Bar:
    """One stacked bar: a label, a group ("before" or "after"), and bytes by owner."""

    label: str
    group: str
    owners: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.owners.values())


def stacked_bars(bars: Sequence[Bar], owners: Sequence[str], budget_bytes: int | None) -> str:
    """Horizontal bars stacked by owner, with the budget as a line across all of them."""
    left, right, bar_height, gap, top = 150, 90, 22, 10, 26
    largest = max([bar.total_bytes for bar in bars] + [budget_bytes or 0, 1])
    scale = (_WIDTH - left - right) / (largest * 1.04)
    height = top + len(bars) * (bar_height + gap) + 8
    parts = [_open(height, "Bytes at each time point by owner, before and after, against the budget")]
    values = []
    budget_x = left + budget_bytes * scale if budget_bytes else -1.0
    for row, bar in enumerate(bars):
        y = top + row * (bar_height + gap)
        parts.append(
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end" class="label">{escape(bar.label)} '
            f'<tspan class="quiet">{escape(bar.group)}</tspan></text>'
        )
        x = float(left)
        for owner, num_bytes in bar.owners.items():
            if num_bytes <= 0:
                continue
            width = num_bytes * scale
            share = num_bytes / max(1, bar.total_bytes)
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0.4):.1f}" height="{bar_height}" '
                f'fill="var(--c{owners.index(owner) % 8})"{_faded(bar)}>'
                f"<title>{escape(bar.label)}, {escape(bar.group)}: {escape(owner)} {format_bytes(num_bytes)} "
                f"({share:.0%} of {format_bytes(bar.total_bytes)})</title></rect>"
            )
            x += width
        at = budget_x if x <= budget_x < x + _VALUE_WIDTH else x  # beside the budget's line, not under it
        values.append(f'<text x="{at + 6:.1f}" y="{y + 15}" class="value">{format_bytes(bar.total_bytes)}</text>')
    if budget_bytes:
        parts.append(
            f'<line x1="{budget_x:.1f}" x2="{budget_x:.1f}" y1="{top - 8}" y2="{height - 4}" class="budget"/>'
            f'<text x="{budget_x:.1f}" y="{top - 12}" text-anchor="middle" class="budget-label">'
            f"budget {format_bytes(budget_bytes)}</text>"
        )
    return "".join(parts + values) + "</svg>"  # values last: they stay readable where the budget's line crosses them


def _faded(bar: Bar) -> str:
    return ' opacity="0.55"' if bar.group == "16 bits" else ""


@dataclass(frozen=True)
class SiteCell:
    """One square of the picture of the model."""

    layer: int | None
    role: str
    bits_per_weight: float
    title: str


def site_map(cells: Sequence[SiteCell]) -> str:
    """The model as a picture: a column per layer, a row per role, coloured by stored bits per weight."""
    layers = sorted({cell.layer for cell in cells if cell.layer is not None})
    inside = list(dict.fromkeys(cell.role for cell in cells if cell.layer is not None))
    outside = [cell for cell in cells if cell.layer is None]
    left, top = 76, 8
    size = max(5.0, min(44.0, (_WIDTH - left - 10) / max(1, len(layers))))
    row_height = 20.0
    height = top + len(inside) * (row_height + 2) + 22 + len(outside) * (row_height + 2) + 30
    parts = [_open(height, "Stored bits per weight at each site")]
    for row, role in enumerate(inside):
        y = top + row * (row_height + 2)
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end" class="label">{escape(role)}</text>')
        for cell in (c for c in cells if c.role == role and c.layer is not None):
            x = left + layers.index(cell.layer) * size  # type: ignore[arg-type]
            parts.append(_cell(x, y, size, row_height, cell))
    y = top + len(inside) * (row_height + 2)
    if layers:
        parts.append(f'<text x="{left}" y="{y + 12}" class="quiet">layer {layers[0]}</text>')
        if len(layers) > 1:
            end = left + len(layers) * size
            parts.append(f'<text x="{end:.0f}" y="{y + 12}" text-anchor="end" class="quiet">layer {layers[-1]}</text>')
    y += 22
    for cell in outside:
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end" class="label">{escape(cell.role)}</text>')
        parts.append(_cell(left, y, max(size, 60.0), row_height, cell))
        y += row_height + 2
    for i, bits in enumerate((2, 3, 4, 8, 16)):
        x = left + i * 90
        parts.append(
            f'<rect x="{x}" y="{y + 6:.0f}" width="14" height="14" fill="{_bits_colour(bits)}"/>'
            f'<text x="{x + 19}" y="{y + 18:.0f}" class="quiet">{bits} bits</text>'
        )
    return "".join(parts) + "</svg>"


def _cell(x: float, y: float, width: float, height: float, cell: SiteCell) -> str:
    square = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height:.1f}" rx="2" '
        f'fill="{_bits_colour(cell.bits_per_weight)}"><title>{escape(cell.title)}</title></rect>'
    )
    if width < _FIGURE_WIDTH:
        return square
    return (
        f'{square}<text x="{x + (width - 1) / 2:.1f}" y="{y + height - 6:.1f}" text-anchor="middle" class="bits" '
        f'pointer-events="none">{cell.bits_per_weight:.1f}</text>'
    )


def _bits_colour(bits: float) -> str:
    """Few bits warm, many bits cool; logarithmic between 2 and 16."""
    share = min(1.0, max(0.0, math.log2(max(bits, 1.0) / 2) / 3))
    return f"hsl({20 + 190 * share:.0f} 65% {52 - 6 * share:.0f}%)"


@dataclass(frozen=True)
class FrontPoint:
    """One plan on the picture of damage against bytes; `kind` is "front", "uniform" or "chosen"."""

    num_bytes: int
    damage: float
    kind: str
    label: str


def pareto(points: Sequence[FrontPoint], budget_bytes: int | None) -> str:
    """Damage (nats per token, logarithmic) against peak bytes: the front, the uniform baselines, the chosen plan."""
    drawn = [point for point in points if point.damage > 0]
    if not drawn:
        return ""
    left, right, top, bottom, height = 84, 16, 14, 40, 300
    lows, highs = min(p.damage for p in drawn), max(p.damage for p in drawn)
    low, high = math.floor(math.log10(lows)), math.ceil(math.log10(highs) + 1e-9)
    high = max(high, low + 1)
    edge_low = min(p.num_bytes for p in drawn) * 0.97
    edge_high = max(p.num_bytes for p in drawn) * 1.03

    def x_of(num_bytes: float) -> float:
        return left + (num_bytes - edge_low) / max(1, edge_high - edge_low) * (_WIDTH - left - right)

    def y_of(damage: float) -> float:
        return top + (high - math.log10(damage)) / (high - low) * (height - top - bottom)

    parts = [_open(height, "Damage against bytes: the front, uniform baselines and the chosen plan")]
    for exponent in range(low, high + 1):
        y = y_of(10.0**exponent)
        parts.append(f'<line x1="{left}" x2="{_WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" class="quiet">{10.0**exponent:.{max(0, -exponent)}f}</text>'
        )
    for i in range(5):
        num_bytes = edge_low + (edge_high - edge_low) * i / 4
        anchor = "start" if i == 0 else "end" if i == 4 else "middle"
        parts.append(
            f'<text x="{x_of(num_bytes):.1f}" y="{height - bottom + 18}" text-anchor="{anchor}" class="quiet">'
            f"{format_bytes(num_bytes)}</text>"
        )
    parts.append(f'<text x="{left}" y="{height - 4}" class="quiet">peak bytes; damage in nats per token upwards</text>')
    if budget_bytes and edge_low <= budget_bytes <= edge_high:
        x = x_of(budget_bytes)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}" class="budget"/>')
    front = sorted((p for p in drawn if p.kind == "front"), key=lambda p: p.num_bytes)
    if len(front) > 1:
        path = " ".join(f"{x_of(p.num_bytes):.1f},{y_of(p.damage):.1f}" for p in front)
        parts.append(f'<polyline points="{path}" class="front"/>')
    for point in sorted(drawn, key=lambda p: ("front", "uniform", "chosen").index(p.kind)):
        radius = {"front": 3, "uniform": 4, "chosen": 6}[point.kind]
        parts.append(
            f'<circle cx="{x_of(point.num_bytes):.1f}" cy="{y_of(point.damage):.1f}" r="{radius}" class="{point.kind}">'
            f"<title>{escape(point.label)}: {format_bytes(point.num_bytes)}, {point.damage:.4g} nats</title></circle>"
        )
    return "".join(parts) + "</svg>"


def stand_alone(svg: str, owners: Sequence[str], colours: Mapping[str, str]) -> str:
    """A drawing for a file of its own: on paper, under a legend of owners, with its styles and the page's colours written out."""
    style = (
        "text{font:12px system-ui,sans-serif;fill:var(--ink)}.quiet{fill:var(--quiet)}"
        ".value{paint-order:stroke;stroke:var(--paper);stroke-width:4px}"
        ".budget{stroke:var(--accent);stroke-width:2;stroke-dasharray:5 4}.budget-label{fill:var(--accent)}"
    )
    height = int(svg.split(f'viewBox="0 0 {_WIDTH} ')[1].split('"')[0]) + _LEGEND_HEIGHT
    _, title, marks = svg.removesuffix("</svg>").partition("<title>")
    title, _, marks = marks.partition("</title>")
    out = (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg"><title>{title}</title>'
        f'<style>{style}</style><rect width="{_WIDTH}" height="{height}" fill="var(--paper)"/>{_legend(owners)}'
        f'<g transform="translate(0 {_LEGEND_HEIGHT})">{marks}</g></svg>'
    )
    for name, colour in colours.items():
        out = out.replace(f"var(--{name})", colour)
    return out


def _legend(owners: Sequence[str]) -> str:
    x, parts = 12.0, []
    for i, owner in enumerate(owners):
        parts.append(f'<rect x="{x:.0f}" y="8" width="12" height="12" fill="var(--c{i % 8})"/>')
        parts.append(f'<text x="{x + 17:.0f}" y="18">{escape(owner)}</text>')
        x += 17 + 7 * len(owner) + 18
    return "".join(parts)


def _open(height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(title)}</title>"
    )
