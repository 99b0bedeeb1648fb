"""The planner against the best uniform choice at equal bytes: models A and B at 25%, 30% and 40% of the 16-bit bytes.

Bytes are those really stored: weights (embedding and head too), the unpacked rest, and a 1,024-token cache. A uniform choice is one
weight option at every site with one cache option at every layer; of all that fit, the four with the least predicted damage
are measured and the best *as measured on the evaluation text* stands for them. KL in nats per token on foreign text, which neither training,
calibration nor the search saw; the interval is a paired bootstrap over blocks of 64 tokens.

`python -m benchmarks.plans [MODEL_FOLDER ...]`
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.results_file import write_results
from haversack import data
from haversack.cost.calibrated import Calibration, calibrate_model, tokenize
from haversack.cost.serving import KV, WEIGHTS, ServingProblem
from haversack.describe.machine import known
from haversack.describe.model import describe_model
from haversack.describe.workload import ServeWorkload
from haversack.engine.measure import DamageMeter, paired_bootstrap
from haversack.plan import make
from haversack.plan.question import Question
from haversack.plan.refine import PlanMeter
from haversack.solve.exact import solve
from haversack.solve.problem import TimePoint

SHARES = (0.25, 0.30, 0.40)
CONTEXT = ServeWorkload(prompt_tokens=768, generate_tokens=257)
EVALUATIONS, SOLVE_SECONDS = 4, 20.0
NUM_SEQUENCES, SEQ_LEN = 12, 512


def main(folders: list[str]) -> None:
    figures: list[dict[str, Any]] = []
    for folder in folders:
        figures += compare(Path(folder))
        print(write_results("plans", figures))


def compare(folder: Path) -> list[dict[str, Any]]:
    """One row per share of the 16-bit bytes."""
    model = describe_model(folder)
    calibration = calibrate_model(model, data.text("calibration"))
    texts = [
        tokenize(model, data.text(name), num_tokens=NUM_SEQUENCES // 2 * SEQ_LEN, seq_len=SEQ_LEN)
        for name in ("foreign-prose", "foreign-code")
    ]
    foreign = DamageMeter(model, torch.cat(texts))
    meter = PlanMeter(calibration, EVALUATIONS, lambda what, done, total: None)
    built = stored_only(model, calibration)
    neutral = [_neutral(group) for group in built.problem.groups]
    whole = built.problem.evaluate(neutral).peak_bytes["device"]
    rows = []
    for share in SHARES:
        limit = int(whole * share)
        within = replace(built, problem=replace(built.problem, capacity_bytes={"device": limit}))
        solution = solve(within.problem, time_limit_seconds=SOLVE_SECONDS)
        refined = meter.refine(within, solution)
        ours = kl(foreign, meter, within, refined.solution.chosen)
        first = kl(foreign, meter, within, solution.chosen)
        label, chosen, theirs = best_uniform(foreign, meter, within, limit)
        low, high = paired_bootstrap(ours, theirs)
        row = {
            "model": folder.name,
            "share_of_16_bit_bytes": share,
            "limit_bytes": limit,
            "ours_bytes": within.problem.evaluate(refined.solution.chosen).peak_bytes["device"],
            "ours_kl": float(ours.mean()),
            "solver_alone_kl": float(first.mean()),
            "predicted_kl": solution.evaluation.damage,
            "uniform": label,
            "uniform_bytes": within.problem.evaluate(chosen).peak_bytes["device"],
            "uniform_kl": float(theirs.mean()),
            "difference_95": [low, high],
            "tokens": ours.numel(),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def stored_only(model: Any, calibration: Calibration) -> ServingProblem:
    """The serving problem with stored bytes alone: what runs beside them is the same for both contenders."""
    question = Question(
        model=model,
        workload=CONTEXT,
        machine=known(),
        budget_bytes=model.num_bytes * 4,
        budget_kind="tensor",
        placement="resident",
        weight_damages=calibration.weight_damages,
        kv_damages=calibration.kv_damages,
    )
    built, _ = make.solve_at(question, 128)
    fixed = sum(built.fixed.values())
    point = TimePoint("decode", "device", (WEIGHTS, KV), (), fixed)
    return replace(built, problem=replace(built.problem, time_points=(point,)))


def best_uniform(
    foreign: DamageMeter, meter: PlanMeter, built: ServingProblem, limit: int
) -> tuple[str, tuple[int, ...], torch.Tensor]:
    """The best measured of the four best predicted uniform choices that fit."""
    problem = built.problem
    weight_ids = dict.fromkeys(c for row in built.weights.values() for c in row)
    kv_ids = dict.fromkeys(c for row in built.kv.values() for c in row)
    fitting = []
    for weight_id in weight_ids:
        for kv_id in kv_ids:
            wanted = {**dict.fromkeys(built.weights, weight_id), **dict.fromkeys(built.kv, kv_id)}
            indices = [g.index(wanted.get(g.id, g.choices[0].id)) for g in problem.groups]
            if None in indices:
                continue
            chosen = tuple(i for i in indices if i is not None)
            taken = problem.evaluate(chosen)
            if taken.peak_bytes["device"] <= limit:
                fitting.append((taken.damage, f"{weight_id}, {kv_id}", chosen))
    measured = [(kl(foreign, meter, built, chosen), label, chosen) for _, label, chosen in sorted(fitting)[:4]]
    theirs, label, chosen = min(measured, key=lambda row: float(row[0].mean()))
    return label, chosen, theirs


def kl(foreign: DamageMeter, meter: PlanMeter, built: ServingProblem, chosen: tuple[int, ...]) -> torch.Tensor:
    """Nats at every token of the evaluation text."""
    weights, caches = built.candidates(built.problem.describe(chosen))
    changed: Mapping = {
        c.site.id: (c.option, meter.tensors(c.site, c.option)) for c in weights if not c.option.is_neutral
    }
    return foreign.kl_per_token(changed, {c.site.id: c.option for c in caches})


def _neutral(group: Any) -> int:
    return next(i for i, choice in enumerate(group.choices) if choice.damage == 0)


if __name__ == "__main__":
    named = sys.argv[1:]
    main(named or [str(data.reference_model(name)) for name in ("a", "b")])
