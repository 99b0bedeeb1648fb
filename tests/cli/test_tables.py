"""Tables keep to their width, and lose nothing on the way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from haversack.cli.tables import table_lines

WORD = st.text("abcdefgh-/", min_size=1, max_size=30)
CELL = st.lists(WORD, max_size=6).map(" ".join)


@given(st.integers(1, 5), st.integers(16, 90), st.data())
def test_no_line_is_longer_and_no_word_is_lost(num_columns: int, width: int, data: st.DataObject) -> None:
    row = st.lists(CELL, min_size=num_columns, max_size=num_columns)
    columns = data.draw(st.lists(WORD.map(lambda w: w[:8]), min_size=num_columns, max_size=num_columns))
    rows = data.draw(st.lists(row, max_size=5))
    right = data.draw(st.sets(st.integers(0, num_columns - 1)))
    heading, lines = table_lines(columns, rows, width, right)
    assert all(len(line) <= width and line == line.rstrip() for line in heading + lines)
    letters = sorted("".join("".join(cell) for cells in rows for cell in cells).replace(" ", ""))
    shown = sorted("".join(lines).replace(" ", ""))
    assert shown == letters if heading else all(shown.count(c) >= letters.count(c) for c in set(letters))


def test_what_fits_stands_side_by_side() -> None:
    heading, lines = table_lines(("bytes", "load"), [("weights", "7.59 MiB"), ("rest", "-")], 80, {1})
    assert heading == ["bytes        load"]
    assert lines == ["weights  7.59 MiB", "rest            -"]


def test_what_does_not_becomes_a_list() -> None:
    heading, lines = table_lines(("bytes", "load"), [("weights", "7.59 MiB"), ("rest", "")], 16, {1})
    assert heading == [] and lines == ["weights", "  load  7.59 MiB"[:16], "rest"]
