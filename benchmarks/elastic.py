"""Folders of any size: what each prefix of an elastic folder's blocks loses, by recipe, beside gptq at as many bytes.

Bytes are those of all matrices, embedding and head included, as stored. KL and perplexity on foreign prose and code, which
neither training nor calibration saw, by one float32 model for all (`benchmarks.scorer`). Rows are kept as they come. Prefixes are taken at even steps of bytes from the
floor to all blocks; `falls` says whether perplexity fell at every step.

`python -m benchmarks.elastic [--models a] [--recipes any-precision bitstack] [--steps 12] [--windows 12]`
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch

from benchmarks.finished_rows import FinishedRows
from benchmarks.results_file import write_results
from benchmarks.scorer import Scorer, perplexity
from haversack import data
from haversack.cost.calibrated import Calibration, collect_statistics
from haversack.cost.stacks import order_of_blocks, stack_damages
from haversack.describe.assemble import read_site
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.model import describe_model
from haversack.parts.weights.base import WeightOption
from haversack.plan.elastic import stacked_option
from haversack.recipes.base import all_recipes


class Bench:
    """One model with its statistics and a scorer."""

    def __init__(self, name: str, num_windows: int):
        folder = data.reference_model(name)
        self.name, self.model = name, describe_model(folder)
        self.calibration: Calibration = collect_statistics(self.model, data.text("calibration"))
        self.checkpoint, self.scorer = Checkpoint.open(folder), Scorer(folder, num_windows=num_windows)
        self.finished = FinishedRows("elastic")
        self._encoded: dict[WeightOption, dict[str, dict[str, torch.Tensor]]] = {}

    def encoded(self, option: WeightOption) -> dict[str, dict[str, torch.Tensor]]:
        """What every site stores under an option."""
        if option not in self._encoded:
            self._encoded = {option: {}}
            for site in self.model.weights:
                task = self.calibration.statistics[site.id].task(read_site(self.checkpoint, site).float())
                self._encoded[option][site.id] = option.encode(task)
        return self._encoded[option]

    def row(self, recipe: str, packed: WeightOption, options: Mapping[str, WeightOption]) -> dict[str, Any]:
        """Every site at an option, read from what `packed` stored of it."""
        written = {site: option.to_dict() for site, option in options.items()}
        key = {**self.scorer.key, "packed": packed.to_dict(), "options": written}
        row = self.finished.get(key, lambda: self._measured(packed, options))
        print(self.name, recipe, row, flush=True)
        return {"model": self.name, "recipe": recipe, **row}

    def _measured(self, packed: WeightOption, options: Mapping[str, WeightOption]) -> dict[str, Any]:
        num_bytes, dense, tensors = 0, {}, self.encoded(packed)
        for site in self.model.weights:
            option, shape = options[site.id], (site.out_features, site.in_features)
            num_bytes += option.stored_bytes(*shape, site.dtype)
            dense[f"{site.module}.{site.parameter}"] = option.dense(tensors[site.id], *shape)
        scored = self.scorer.score(dense)
        weights = sum(site.num_parameters for site in self.model.weights)
        return {
            "bytes": num_bytes,
            "bits_per_weight": round(8 * num_bytes / weights, 4),
            "kl": fmean(scored["kl"]),
            "perplexity": perplexity(fmean(scored["nll"])),
        }

    def prefixes(self, recipe: str, steps: int) -> list[dict[str, Any]]:
        """Rows at even steps of bytes, from the floor to all blocks."""
        option = stacked_option((recipe,))
        assert option.stack is not None
        damages = stack_damages(self.calibration, option, lambda what, done, total: None)
        stacks = [option.shortened(n) for n in range(option.least_blocks, option.stack.blocks + 1)]
        sizes = {}
        for site in self.model.weights:
            stored = [each.stored_bytes(site.out_features, site.in_features, site.dtype) for each in stacks]
            sizes[site.id] = tuple(b - a for a, b in pairwise(stored))
        order = order_of_blocks(damages, sizes)
        held, rows, taken = dict.fromkeys(sizes, 0), [], 0
        total = sum(map(sum, sizes.values()))
        due = [total * step // steps for step in range(steps + 1)]
        for site in (*order, None):
            while due and taken >= due[0]:
                due.pop(0)
                if not rows or rows[-1]["blocks"] < sum(held.values()):
                    row = self.row(recipe, option, {s: stacks[n] for s, n in held.items()})
                    rows.append({**row, "blocks": sum(held.values())})
            if site is not None:
                taken += sizes[site][held[site]]
                held[site] += 1
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["a"])
    parser.add_argument("--recipes", nargs="*", default=["any-precision", "bitstack"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--windows", type=int, default=12, help="of 512 tokens of each text")
    asked = parser.parse_args()
    figures: list[dict[str, Any]] = []
    for name in asked.models:
        bench = Bench(name, asked.windows)
        yardstick = []
        for option in (o for o in all_recipes()["gptq"].options() if o.grid.group_size == 64 and o.grid.symmetric):
            yardstick.append(bench.row("gptq", option, {site.id: option for site in bench.model.weights}))
        figures += yardstick
        for recipe in asked.recipes:
            rows = bench.prefixes(recipe, asked.steps)
            for before, row in zip([None, *rows], rows, strict=False):
                row["falls"] = before is None or row["perplexity"] < before["perplexity"]
            figures += rows
    if set(asked.recipes) >= set(parser.get_default("recipes")):
        print(write_results("elastic", figures))


if __name__ == "__main__":
    main()
