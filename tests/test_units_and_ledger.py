"""Units in and out, and ledger sums."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haversack.errors import UsageError
from haversack.ledger import DTYPE_BYTES, Ledger, StoredTensor, total_bytes
from haversack.units import format_bytes, format_rate, format_seconds, parse_budget, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("8GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("1.5 MiB", 3 * 2**19),
        ("512 kib", 2**19),
        ("4096", 4096),
        (7, 7),
        ("10B", 10),
    ],
)
def test_bytes_are_read_as_written(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["0", "-1GiB", "8 potatoes", "", "GiB", "1e9", "0.0GB", "nan", "8GiB8", 0, -5])
def test_nonsense_is_refused_by_name(text: str | int) -> None:
    with pytest.raises(UsageError, match=r"must be above zero|not a number of bytes"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["0%", "150%", "-3%", "x%", "%"])
def test_percentages_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="percentage"):
        parse_budget(text, 1000)


def test_percent_is_of_what_is_available() -> None:
    assert parse_budget("60%", 1000) == 600
    assert parse_budget("8GiB", 1000) == 8 * 2**30


@given(st.integers(1, 2**60))
def test_formatted_bytes_read_back_within_half_a_percent(num_bytes: int) -> None:
    assert abs(parse_bytes(format_bytes(num_bytes)) - num_bytes) <= max(1, num_bytes * 0.006)


def test_rates_have_no_exponent() -> None:
    assert [format_rate(rate) for rate in (0.0279, 41.94, 999.4, 1980.4, 1e6)] == [
        "0.0279",
        "41.9",
        "999",
        "1,980",
        "1,000,000",
    ]


def test_seconds_are_readable() -> None:
    assert [format_seconds(s) for s in (0.42, 12.3, 245, 7800)] == ["420 ms", "12.3 s", "4 min 05 s", "2 h 10 min"]


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 50), max_size=3)), max_size=6))
def test_declared_bytes_add_up(rows: list[tuple[str, list[int]]]) -> None:
    tensors = [StoredTensor(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(rows)]
    expected = 0
    for tensor in tensors:
        count = 1
        for length in tensor.shape:
            count *= length
        expected += count * DTYPE_BYTES[tensor.dtype]
    assert total_bytes(tensors) == expected


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["load", "prefill", "decode"]),
            st.sampled_from(["weights", "kv"]),
            st.sampled_from(["device", "disk"]),
            st.integers(0, 2**50),
        )
    )
)
def test_ledger_sums_and_peaks(rows: list[tuple[str, str, str, int]]) -> None:
    ledger = Ledger()
    for row in rows:
        ledger.add(*row)
    for tier in ("device", "disk"):
        sums = {point: sum(n for p, _, t, n in rows if p == point and t == tier) for point, *_ in rows}
        assert {point: ledger.total_bytes(point, tier) for point in sums} == sums
        assert ledger.peak(tier)[1] == max(sums.values(), default=0)
    assert Ledger.from_dict(ledger.to_dict()).to_dict() == ledger.to_dict()
    assert sum(n for *_, n in ledger.rows()) == sum(n for *_, n in rows)
