"""A 1.1B model packed by second-order feedback at 4 bits, 32k calibration tokens: seconds of every step, and the peak of private memory.

Makes the model from its config (random weights and tokens: the work is the same) under `build/`, calibrates and packs. Every finished
step is a line in `FOLDER-steps.jsonl`; a killed run goes on there, so that it may be measured by pieces on a machine that is not
one's own. `python -m benchmarks.packing [FOLDER]`
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.results_file import write_results
from benchmarks.streaming import CONFIG, make_model
from haversack.cost.damage import Damage
from haversack.describe.machine import known
from haversack.describe.model import Model, describe_model
from haversack.describe.workload import ServeWorkload
from haversack.engine.calibrate import calibrate
from haversack.jobs.memory import PeakSampler, private_bytes
from haversack.jobs.pack import pack
from haversack.parts.kv.base import KVOption
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.hessian_feedback import HessianFeedback
from haversack.parts.weights.integer import IntegerGrid
from haversack.plan.make import make_plan
from haversack.plan.question import Question
from haversack.plan.schema import Plan

NUM_TOKENS, SEQ_LEN = 32_768, 512
OPTION = WeightOption(grid=IntegerGrid(4, 128), rounding=HessianFeedback())


def main(folder: Path) -> None:
    model = describe_model(make_model(folder, CONFIG))
    log = folder.with_name(folder.name + "-steps.jsonl")
    baseline = private_bytes()
    tokens = torch.randint(
        0, model.vocab_size, (NUM_TOKENS // SEQ_LEN, SEQ_LEN), generator=torch.Generator().manual_seed(0)
    )
    with PeakSampler() as sampler:
        statistics = calibrate(
            model,
            tokens,
            cache=folder.with_name(folder.name + "-cache"),
            progress=_timed(log, "calibrate", sampler, baseline),
        )
        plan = uniform_plan(model)
        packed = folder.with_name(folder.name + "-packed")
        if not packed.exists():
            pack(model, plan, packed, statistics=statistics, progress=_timed(log, "pack", sampler, baseline))
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    seconds = {job: sum(s["seconds"] for s in steps if s["job"] == job) for job in ("calibrate", "pack")}
    figures = {
        "calibration_tokens": NUM_TOKENS,
        "threads": torch.get_num_threads(),
        "seconds": {**seconds, "total": sum(seconds.values())},
        "peak_bytes_over_baseline": max(s["peak_bytes_over_baseline"] for s in steps),
        "baseline_bytes": baseline,
        "steps": steps,
    }
    print(write_results("packing", figures))


def uniform_plan(model: Model) -> Plan:
    """Every matrix at `OPTION`, the cache as it is."""
    workload = ServeWorkload(prompt_tokens=256, generate_tokens=64)
    damage = Damage(1e-3, "proxied")
    weights = {site.id: {OPTION: damage} for site in model.weights}
    kv = {site.id: {KVOption(): Damage(0.0, "measured")} for site in model.attention}
    question = Question(
        model, known(), workload, 16 * 2**30, budget_kind="tensor", weight_damages=weights, kv_damages=kv
    )
    return make_plan(question).require_fit()


def _timed(log: Path, job: str, sampler: PeakSampler, baseline: int) -> Callable[[str, int, int], None]:
    """Writes what passed since the last call of the progress function as one step."""
    last: list[Any] = [time.perf_counter(), None, -1]

    def tell(what: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if last[1] is not None and done > last[2] and now - last[0] > 1e-3:  # what an earlier run did takes no time
            row = {"job": job, "step": last[1], "seconds": now - last[0]}
            row["peak_bytes_over_baseline"] = sampler.peak_bytes - baseline
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
        last[:] = [now, what, done]

    return tell


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/llama-1.1b"))
