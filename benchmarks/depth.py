"""Depth: what whole sublayers and layers are worth, models A and B in 16 bits otherwise.

Attention sublayers, feed-forward sublayers or whole layers dropped, those first that turn what passes them least (1 less the cosine, on calibration
text), and layers skipped evenly or in one stretch (each stretch between the first and the last layer is measured; its best, mean and worst stand
here). Bytes are those of matrices and of a 1,024-token cache that are gone. KL in nats per token on foreign prose and code.

`python -m benchmarks.depth [--models a b]`
"""

from __future__ import annotations

import argparse
from statistics import fmean
from typing import Any

import torch

from benchmarks.plans import NUM_SEQUENCES, SEQ_LEN
from benchmarks.results_file import write_results
from haversack import data
from haversack.cost.calibrated import tokenize
from haversack.cost.single_changes import stage_model
from haversack.describe.model import Model, describe_model
from haversack.engine.layer_change import layer_changes
from haversack.engine.measure import DamageMeter
from haversack.parts.kv.base import KVOption
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.dropped import DroppedGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.recipes.unified_layer_skipping import kept_layers

DROPPED = WeightOption(DroppedGrid(), NearestRounding())
SUBLAYERS = {"attention": ("query", "key", "value", "qkv", "output"), "feed-forward": ("gate", "up", "down")}
CACHE_TOKENS, CALIBRATION_TOKENS = 1024, 8192


class Depth:
    """One model and a meter on foreign text."""

    def __init__(self, name: str):
        self.name, self.model = name, describe_model(data.reference_model(name))
        half = NUM_SEQUENCES // 2 * SEQ_LEN
        texts = [self._tokens(text, half) for text in ("foreign-prose", "foreign-code")]
        self.meter = DamageMeter(self.model, torch.cat(texts))
        self.changes = layer_changes(stage_model(self.model), self._tokens("calibration", CALIBRATION_TOKENS))

    def _tokens(self, text: Any, number: int) -> torch.Tensor:
        return tokenize(self.model, data.text(text), num_tokens=number, seq_len=SEQ_LEN)

    def kl(self, sites: list[str]) -> float:
        return float(self.meter.kl_per_token(dict.fromkeys(sites, (DROPPED, {}))).mean())

    def row(self, what: str, number: int, layers: list[int], kinds: tuple[str, ...]) -> dict[str, Any]:
        sites = sites_of(self.model, layers, kinds)
        row = {
            "model": self.name,
            "dropped": what,
            "number": number,
            "layers": layers,
            "weight_bytes": sum(site.num_bytes for site in self.model.weights if site.id in sites),
            "cache_bytes": cache_bytes(self.model, layers) if "attention" in kinds else 0,
            "kl": self.kl(sites),
        }
        print(row, flush=True)
        return row

    def by_cosine(self, what: str, number: int) -> dict[str, Any]:
        """The `number` sublayers, or layers, that turn what passes them least."""
        turned = [c.whole if what == "layers" else c.parts[what] for c in self.changes]
        layers = sorted(sorted(range(len(turned)), key=lambda layer: turned[layer])[:number])
        return self.row(what, number, layers, tuple(SUBLAYERS) if what == "layers" else (what,))

    def skipped(self, number: int) -> list[dict[str, Any]]:
        """So many layers skipped evenly, and in one stretch that leaves the first and the last."""
        every = self.model.num_layers
        evenly = sorted(set(range(every)) - kept_layers(every, every - number))
        rows = [self.row("layers, evenly", number, evenly, tuple(SUBLAYERS))]
        stretches = [list(range(first, first + number)) for first in range(1, every - number)]
        found = [self.kl(sites_of(self.model, layers, tuple(SUBLAYERS))) for layers in stretches]
        rows.append({**rows[0], "dropped": "layers, in one stretch", "layers": stretches[found.index(min(found))],
                     "kl": min(found), "mean_kl": fmean(found), "worst_kl": max(found)})  # fmt: skip
        print(rows[-1], flush=True)
        return rows


def sites_of(model: Model, layers: list[int], kinds: tuple[str, ...]) -> list[str]:
    roles = {role for kind in kinds for role in SUBLAYERS[kind]}
    return [site.id for site in model.weights if site.layer in layers and site.role in roles]


def cache_bytes(model: Model, layers: list[int]) -> int:
    size = {"batch_size": 1, "capacity_tokens": CACHE_TOKENS, "dtype": model.dtype}
    return sum(KVOption().stored_bytes(site, **size) for site in model.attention if site.layer in layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["a", "b"])
    figures: list[dict[str, Any]] = []
    for name in parser.parse_args().models:
        depth = Depth(name)
        for number in range(1, depth.model.num_layers // 2 + 1):
            figures += [depth.by_cosine(what, number) for what in (*SUBLAYERS, "layers")]
            figures += depth.skipped(number)
    print(write_results("depth", figures))


if __name__ == "__main__":
    main()
