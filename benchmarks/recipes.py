"""The leaderboard of weight recipes: every option uniformly at all matrices of models A and B, and what it loses at which bytes.

Bytes are those really stored (codes, scales, tables, indices) over all matrices, embedding and head included; bits per
weight are eight times them over the number of weights. Loss is KL in nats per token on foreign prose and code, which
neither training nor calibration saw. Each row is set against the best row of round-to-nearest and of gptq that stores
no more than half a percent above its own bytes; the interval is a paired bootstrap over blocks of 64 tokens of this row
less that one, so that below zero is better. Each matrix is packed on its own, with statistics of the unpacked model. Codes
that lose nothing are left out.

`python -m benchmarks.recipes [--model a] [--recipe ID ...] [--fresh]`: losses by token are kept in the cache folder, so that
an interrupted run goes on; `--fresh` measures again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.results_file import write_results
from haversack import data
from haversack.cache import cache_folder
from haversack.cost.calibrated import tokenize
from haversack.describe.assemble import read_site
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.model import Model, describe_model
from haversack.engine.calibrate import CalibrationSettings, calibrate
from haversack.engine.measure import DamageMeter, paired_bootstrap
from haversack.engine.site_statistics import Statistics
from haversack.parts.weights.base import WeightOption, WeightTask
from haversack.recipes.base import all_recipes

NUM_SEQUENCES, SEQ_LEN = 12, 512
CALIBRATION_TOKENS = 32_768
YARDSTICKS = ("round-to-nearest", "gptq")
SAME_BYTES = 1.005


@dataclass(frozen=True)
class Row:
    """One option at every matrix of one model."""

    recipe: str
    option: WeightOption
    num_bytes: int
    bits_per_weight: float
    kl: torch.Tensor
    seconds: float


class Bench:
    """One model, its statistics, and a meter on foreign text."""

    def __init__(self, name: str, fresh: bool):
        folder: Path = data.reference_model(name)
        self.name, self.fresh = name, fresh
        self.model: Model = describe_model(folder)
        ids = tokenize(self.model, data.text("calibration"), num_tokens=CALIBRATION_TOKENS, seq_len=SEQ_LEN)
        settings = CalibrationSettings()
        self.statistics: Statistics = calibrate(self.model, ids, cache=cache_folder("calibration"), settings=settings)
        self.checkpoint = Checkpoint.open(folder)
        self.kept = cache_folder("benchmarks") / "recipes" / self.model.fingerprint[:16]
        self.kept.mkdir(parents=True, exist_ok=True)
        self._meter: DamageMeter | None = None

    @property
    def meter(self) -> DamageMeter:
        if self._meter is None:
            texts = [
                tokenize(self.model, data.text(text), num_tokens=NUM_SEQUENCES // 2 * SEQ_LEN, seq_len=SEQ_LEN)
                for text in ("foreign-prose", "foreign-code")
            ]
            self._meter = DamageMeter(self.model, torch.cat(texts), chunk_tokens=SEQ_LEN)
        return self._meter

    def row(self, recipe: str, option: WeightOption) -> Row:
        """Pack every matrix and measure, or read what an earlier run measured."""
        key = hashlib.sha256(json.dumps(option.to_dict(), sort_keys=True).encode()).hexdigest()[:24]
        file = self.kept / f"{key}.pt"
        if self.fresh or not file.exists():
            started = time.perf_counter()
            packed = {site.id: (option, self._packed(site, option)) for site in self.model.weights}
            seconds = time.perf_counter() - started
            num_bytes = sum(t.untyped_storage().nbytes() for _, tensors in packed.values() for t in tensors.values())
            torch.save([self.meter.kl_per_token(packed), num_bytes, seconds], file)
        kl, num_bytes, seconds = torch.load(file)
        num_weights = sum(site.num_parameters for site in self.model.weights)
        row = Row(recipe, option, num_bytes, 8 * num_bytes / num_weights, kl, seconds)
        print(f"{self.name} {recipe:20s} {row.bits_per_weight:7.4f} bits  KL {float(kl.mean()):.5f}  {seconds:5.0f} s"
              f"  {option.label}", flush=True)  # fmt: skip
        return row

    def _packed(self, site: Any, option: WeightOption) -> dict[str, torch.Tensor]:
        task = WeightTask(read_site(self.checkpoint, site).float())
        if site.id in self.statistics:
            task.hessian = self.statistics[site.id].hessian
        return option.encode(task)


def against(row: Row, rows: list[Row], recipe: str) -> dict[str, Any]:
    """The best row of a yardstick with no more bytes, and the interval of the difference; nothing where none has."""
    fitting = [r for r in rows if r.recipe == recipe and r.num_bytes <= row.num_bytes * SAME_BYTES]
    if not fitting:
        return {}
    best = min(fitting, key=lambda r: float(r.kl.mean()))
    low, high = paired_bootstrap(row.kl, best.kl)
    return {f"{recipe}_bits": round(best.bits_per_weight, 4), f"minus_{recipe}_95": f"{low:+.4f} to {high:+.4f}"}


def figures(name: str, rows: list[Row]) -> list[dict[str, Any]]:
    """What the results file says of one model, from fewest bytes to most."""
    return [
        {
            "model": name,
            "recipe": row.recipe,
            "option": row.option.label,
            "bytes": row.num_bytes,
            "bits_per_weight": round(row.bits_per_weight, 4),
            "kl": float(row.kl.mean()),
            **{key: value for recipe in YARDSTICKS for key, value in against(row, rows, recipe).items()},
        }
        for row in sorted(rows, key=lambda r: r.num_bytes)
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", action="append", choices=["a", "b"])
    parser.add_argument("--recipe", action="append")
    parser.add_argument("--fresh", action="store_true")
    asked = parser.parse_args()
    found: list[dict[str, Any]] = []
    for name in asked.model or ["a", "b"]:
        bench, rows = Bench(name, asked.fresh), []
        for recipe in all_recipes().values():
            if recipe.resident == "weights" and (not asked.recipe or recipe.id in (*YARDSTICKS, *asked.recipe)):
                rows += [bench.row(recipe.id, option) for option in recipe.options() if not option.lossless]
        found += figures(name, rows)
        if not asked.recipe:
            print(write_results("recipes", found))


if __name__ == "__main__":
    main()
