"""Tables as lines of text in the width there is: cells wrap between words, and where columns can't stand side by side, each row
becomes a short list."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Sequence

LONGEST_WORD = 24
"""Longer ones are wrapped at their hyphens where the width asks for it."""

GAP = 2
"""Spaces between columns, and before what belongs to the line above."""


def table_lines(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, right: Collection[int] = ()
) -> tuple[list[str], list[str]]:
    """The heading's lines and the rows' lines, none longer than `width` unless `width` is below 16 columns.

    Cells of the columns `right` are aligned right and never wrapped. The heading is empty where rows are lists.
    """
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    natural = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    least = [
        natural[i] if i in right else max((len(piece) for row in cells for piece in _pieces(row[i])), default=0)
        for i in range(len(columns))
    ]
    room = width - GAP * (len(columns) - 1)
    if sum(least) > room:
        return [], _lists(columns, cells[1:], max(width, 16))
    widths = _shared(natural, least, room)
    lines = [_side_by_side(row, widths, right) for row in cells]
    return lines[0], [line for row in lines[1:] for line in row]


def _shared(natural: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """The largest widths up to a common cap that fit, no column below its least."""
    widths = list(least)
    for cap in range(1, max(natural, default=0) + 1):
        capped = [min(n, max(low, cap)) for n, low in zip(natural, least, strict=True)]
        if sum(capped) > room:
            break
        widths = capped
    for i, n in enumerate(natural):  # what the common cap left over goes to the first that can use it
        widths[i] += min(n - widths[i], room - sum(widths))
    return widths


def _pieces(cell: str) -> list[str]:
    """What a cell is never broken within."""
    words = cell.split()
    return [p for word in words for p in (re.split("(?<=-)", word) if len(word) > LONGEST_WORD else [word])]


def _wrapped(cell: str, width: int) -> list[str]:
    is_long = any(len(word) > max(width, LONGEST_WORD) for word in cell.split())
    return textwrap.wrap(cell, width, break_on_hyphens=is_long) or [""]


def _side_by_side(row: Sequence[str], widths: Sequence[int], right: Collection[int]) -> list[str]:
    wrapped = [_wrapped(cell, max(1, n)) for cell, n in zip(row, widths, strict=True)]
    lines = []
    for k in range(max(map(len, wrapped))):
        pieces = [part[k] if k < len(part) else "" for part in wrapped]
        padded = [p.rjust(n) if i in right else p.ljust(n) for i, (p, n) in enumerate(zip(pieces, widths, strict=True))]
        lines.append((" " * GAP).join(padded).rstrip())
    return lines


def _lists(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Each row as its first cell, and below it the other columns' names and cells; empty cells are left out."""
    name_width = max((len(name) for name in columns[1:]), default=0)
    lines = []
    for row in rows:
        lines += [line.rstrip() for line in textwrap.wrap(row[0], width, break_on_hyphens=False)]
        for name, cell in zip(columns[1:], row[1:], strict=True):
            if cell.strip():
                head = " " * GAP + name.ljust(name_width) + " " * GAP
                wrapped = textwrap.wrap(
                    cell, width, initial_indent=head, subsequent_indent=" " * 2 * GAP, break_on_hyphens=False
                )
                lines += [line.rstrip() for line in wrapped]  # before a word that it breaks, textwrap leaves a blank
    return lines
