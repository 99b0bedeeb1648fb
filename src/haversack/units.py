"""Bytes and seconds in and out: GiB is 2^30 and GB is 10^9, always, on input and on output."""

from __future__ import annotations

import re

from haversack.errors import UsageError

_FACTORS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)\s*")
_EXAMPLES = "write it like 8GiB, 8GB, 512MiB or 60%"


def parse_bytes(text: str | int) -> int:
    """Bytes of `8GiB`, `8GB`, `1.5 MiB`, `4096`; an int passes through.

    Raises UsageError for zero, negative or unreadable quantities.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        value = text
    else:
        match = _QUANTITY.fullmatch(str(text))
        if not match or match[2].upper() not in _FACTORS:
            raise UsageError(f"{text!r} is not a number of bytes; {_EXAMPLES}.")
        value = int(float(match[1]) * _FACTORS[match[2].upper()])
    if value <= 0:
        raise UsageError(f"{text!r} is {value} bytes, but must be above zero; {_EXAMPLES}.")
    return value


def parse_budget(text: str | int, available_bytes: int) -> int:
    """Like `parse_bytes`, and `60%` of `available_bytes` (the smaller of cgroup limit and available memory)."""
    if isinstance(text, str) and text.strip().endswith("%"):
        try:
            percent = float(text.strip()[:-1])
        except ValueError:
            raise UsageError(f"{text!r} is not a percentage; {_EXAMPLES}.") from None
        if not 0 < percent <= 100:
            raise UsageError(f"{text!r} is out of range: a percentage lies above 0 and at most at 100; {_EXAMPLES}.")
        return int(available_bytes * percent / 100)
    return parse_bytes(text)


def format_bytes(num_bytes: int | float) -> str:
    """`1.50 GiB`, `24.0 MiB`, `512 B`: binary units, three significant figures."""
    sign, size = ("-" if num_bytes < 0 else ""), abs(float(num_bytes))
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    digits = 0 if unit == "B" else max(0, 3 - len(str(int(size))))
    return f"{sign}{size:.{digits}f} {unit}"


def format_seconds(seconds: float) -> str:
    """`420 ms`, `12.3 s`, `4 min 05 s`, `2 h 10 min`."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_count(number: int) -> str:
    """`70.6 billion`, `124 million`, `8,192`."""
    for size, word in ((10**9, " billion"), (10**6, " million")):
        if number >= size:
            return f"{number / size:.3g}{word}"
    return f"{number:,}"


def format_rate(per_second: float) -> str:
    """Three figures and never an exponent: `0.0279`, `41.9`, `1,980`."""
    return f"{per_second:,.0f}" if per_second >= 1000 else f"{per_second:.3g}"
