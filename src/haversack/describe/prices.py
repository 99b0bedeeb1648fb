"""Prices of machines per hour: a file that ships with the package, or the user's own."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from haversack.errors import UsageError

_FIELDS = ("dollars_per_hour", "source")


@dataclass(frozen=True)
class Price:
    """US dollars per hour of one machine, and who says so."""

    dollars_per_hour: float
    source: str

    def per_million(self, seconds_per_item: float) -> float:
        """Dollars for a million items that take so many seconds each."""
        return 1e6 * seconds_per_item * self.dollars_per_hour / 3600


def read_prices(path: Path | None = None) -> dict[str, Price]:
    """Prices by the machine's name, from `path` or from the package's own file. Raises UsageError naming what is wrong."""
    where = str(path) if path is not None else "prices.toml"
    try:
        text = path.read_text() if path is not None else files("haversack.describe").joinpath("prices.toml").read_text()
        rows = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise UsageError(
            f"the prices in {where!r} can't be read: {reason}; name a TOML file with dollars_per_hour and source for each machine."
        ) from None
    return {name.lower(): _price(where, name, row) for name, row in rows.items()}


def _price(where: str, name: str, row: Any) -> Price:
    if not isinstance(row, dict) or set(row) != set(_FIELDS):
        raise UsageError(f"{where!r} must give {name!r} the fields {', '.join(_FIELDS)} and no others.")
    dollars = row["dollars_per_hour"]
    if isinstance(dollars, bool) or not isinstance(dollars, int | float) or not 0 < dollars < 1e9:
        raise UsageError(f"{where!r} says that {name!r} costs {dollars!r} an hour, but a number above zero is due.")
    return Price(float(dollars), str(row["source"]))
