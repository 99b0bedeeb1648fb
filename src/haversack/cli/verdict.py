"""How every plan's answer begins, whatever was asked: does it fit, where is the peak, how much is short, what would do."""

from __future__ import annotations

from typing import Any

from haversack.ledger import Ledger
from haversack.units import format_bytes


def verdict_json(
    ledger: Ledger,
    *,
    fits: bool,
    budget_bytes: int | None,
    budget_kind: str,
    shortfall_bytes: int,
    cheapest_change: str | None,
) -> dict[str, Any]:
    """The keys on top of every plan's `--json`; `timeline` is time point -> resident -> tier -> bytes."""
    point, peak = ledger.peak()
    return {
        "fits": fits,
        "budget_bytes": budget_bytes,
        "budget_kind": budget_kind,
        "peak_bytes": peak,
        "peak_time_point": point,
        "shortfall_bytes": shortfall_bytes,
        "cheapest_change": cheapest_change,
        "timeline": ledger.to_dict(),
    }


def verdict_words(*, fits: bool, budget_bytes: int | None, budget_kind: str) -> str:
    """`fits in 8.00 GiB (the whole process)`."""
    within = f" in {format_bytes(budget_bytes)}" if budget_bytes else ""
    of = "the whole process" if budget_kind == "process" else "tensors alone"
    return f"{'fits' if fits else 'does not fit'}{within} ({of})"
