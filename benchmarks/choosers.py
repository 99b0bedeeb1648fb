"""Published choosers and the planner on the same options at equal bytes: weights at 20%, 25% and 30% of the 16-bit bytes.

Everybody sees the same table (bytes of every option at every matrix and the damage that it alone was measured or estimated to do), the same weights and the
same calibration text; caches stay as they are. KL in nats per token on foreign text, which neither calibration nor any search saw; the interval
is a paired bootstrap over blocks of 64 tokens of the chooser less the planner, so that above zero the planner is better.

`python -m benchmarks.choosers [--models a b] [--choosers ID ...]`
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

from benchmarks.plans import NUM_SEQUENCES, SEQ_LEN, SOLVE_SECONDS, kl, stored_only
from benchmarks.results_file import write_results
from haversack import data
from haversack.cost.calibrated import Calibration, calibrate_model, tokenize
from haversack.describe.model import describe_model
from haversack.engine.measure import DamageMeter, paired_bootstrap
from haversack.parts.kv.base import KVOption
from haversack.plan.choosers import choose_by
from haversack.plan.refine import PlanMeter
from haversack.recipes.base import all_recipes
from haversack.solve.exact import solve

SHARES = (0.20, 0.25, 0.30)
EVALUATIONS = 6
PLANNER = "planner"


def main() -> None:
    ids = [recipe.id for recipe in all_recipes().values() if recipe.choose is not None and not recipe.options()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["a", "b"])
    parser.add_argument("--choosers", nargs="+", default=ids, choices=ids)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    asked = parser.parse_args()
    figures: list[dict[str, Any]] = []
    for name in asked.models:
        figures += compare(name, asked.choosers, asked.shares)
    if asked.choosers == ids:
        print(write_results("choosers", figures))


def compare(name: str, choosers: list[str], shares: list[float]) -> list[dict[str, Any]]:
    """A row per share and chooser, the planner first."""
    model = describe_model(data.reference_model(name))
    calibration: Calibration = calibrate_model(model, data.text("calibration"))
    plain = {
        site: {option: damage for option, damage in row.items() if option.is_neutral}
        for site, row in calibration.kv_damages.items()
    }
    assert all(list(row) == [KVOption()] for row in plain.values())
    texts = [
        tokenize(model, data.text(text), num_tokens=NUM_SEQUENCES // 2 * SEQ_LEN, seq_len=SEQ_LEN)
        for text in ("foreign-prose", "foreign-code")
    ]
    foreign, meter = (
        DamageMeter(model, torch.cat(texts)),
        PlanMeter(calibration, EVALUATIONS, lambda what, done, total: None),
    )
    built = stored_only(model, replace(calibration, kv_damages=plain))
    weight_bytes = sum(site.num_bytes for site in model.weights)
    fixed = sum(built.fixed.values()) + sum(c.stored_bytes for row in built.kv.values() for c in row.values())
    rows = []
    for share in shares:
        limit = int(weight_bytes * share) + fixed
        within = replace(built, problem=replace(built.problem, capacity_bytes={"device": limit}))
        solution = solve(within.problem, time_limit_seconds=SOLVE_SECONDS)
        ours = meter.refine(within, solution).solution
        found = {PLANNER: ours} | {chooser: choose_by(chooser, within, solution, meter) for chooser in choosers}
        losses = {who: kl(foreign, meter, within, choice.chosen) for who, choice in found.items()}
        for who, choice in found.items():
            low, high = paired_bootstrap(losses[who], losses[PLANNER])
            row = {
                "model": name,
                "share_of_16_bit_bytes": share,
                "chooser": who,
                "weight_bytes": choice.evaluation.peak_bytes["device"] - fixed,
                "summed_damage": choice.evaluation.damage,
                "kl": float(losses[who].mean()),
                "minus_planner_95": None if who == PLANNER else f"{low:+.4f} to {high:+.4f}",
            }
            print(row, flush=True)
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
