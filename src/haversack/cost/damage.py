"""Damage in nats per token, always with its label.

*measured*: KL of a whole plan, or of one site, against the unpacked model. *proxied*: output error weighted by
second-order statistics from one calibration pass. *cited*: published, with source and range. *unknown*: nobody said.
"""

from __future__ import annotations

import math
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

LABELS = ("measured", "proxied", "cited", "unknown")
"""From best to worst known; a sum carries the worst label of its terms."""


@dataclass(frozen=True)
class Damage:
    """`nats` per token (None where unknown), how it is known, its range and its source.

    `probes` are nats per answer token of probes (`haversack.probes.suite`), by kind, where they were measured.
    """

    nats: float | None
    label: str
    low: float | None = None
    high: float | None = None
    source: str = ""
    probes: tuple[tuple[str, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        facts = {"nats": self.nats, "label": self.label, "low": self.low, "high": self.high, "source": self.source}
        return {**facts, "probes": dict(self.probes)}

    def on(self, kinds: Sequence[str]) -> float | tuple[float, ...]:
        """What the solver adds up: the text's nats, and, where there are `kinds` of probes, theirs; text's stand in for a probe not measured."""
        nats = self.nats or 0.0
        found = dict(self.probes)
        return (nats, *(found.get(kind, nats) for kind in kinds)) if kinds else nats


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
