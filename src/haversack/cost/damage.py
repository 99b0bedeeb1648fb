"""Damage in nats per token, always with its label.

*measured*: KL of a whole plan, or of one site, against the unpacked model. *proxied*: output error weighted by
second-order statistics from one calibration pass. *cited*: published, with source and range. *unknown*: nobody said.
"""

from __future__ import annotations

import math
import statistics
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

LABELS = ("measured", "proxied", "cited", "unknown")
"""From best to worst known; a sum carries the worst label of its terms."""


@dataclass(frozen=True)
class Damage:
    """`nats` per token (None where unknown), how it is known, its range and its source."""

    nats: float | None
    label: str
    low: float | None = None
    high: float | None = None
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"nats": self.nats, "label": self.label, "low": self.low, "high": self.high, "source": self.source}


NONE = Damage(0.0, "measured", 0.0, 0.0, "the checkpoint's own dtype, untouched")


def worst_label(labels: list[str]) -> str:
    """The worst known of several labels; "measured" for none."""
    return max(labels, key=LABELS.index, default="measured")


@cache
def cited_weight_damages() -> tuple[tuple[dict[str, Any], Damage], ...]:
    """The published rows: the setting, and the damage of a *whole model* so quantized (median and range over models)."""
    text = resources.files("haversack.cost").joinpath("cited.toml").read_text(encoding="utf-8")
    rows = []
    for row in tomllib.loads(text)["weights"]:
        nats = [math.log(q / p) for q, p in zip(row["perplexity"], row["perplexity_16"], strict=True)]
        damage = Damage(statistics.median(nats), "cited", min(nats), max(nats), f"{row['source']}; {row['models']}")
        rows.append((row, damage))
    return tuple(rows)
