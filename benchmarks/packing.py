"""A 1.1B model packed by second-order feedback at 4 bits, 32k calibration tokens: seconds of every step, and the peak of private memory.

Makes the model from its config (random weights and tokens: the work is the same) under `build/`, calibrates and packs. Every finished
step is a line in `FOLDER-steps.jsonl`; a killed run goes on there, so that it may be measured by pieces on a machine that is not
one's own. `--layers N` takes that many of the 16 layers and states the whole as what lies outside plus 16 / N of what lies inside:
layers are alike. `python -m benchmarks.packing [FOLDER] [--layers N]`
"""

from __future__ import annotations

import argparse
import json
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


def main(folder: Path, num_layers: int) -> None:
    model = describe_model(make_model(folder, {**CONFIG, "num_hidden_layers": num_layers}))
    log = folder.with_name(folder.name + "-steps.jsonl")
    baseline = private_bytes()
    tokens = torch.randint(
        0, model.vocab_size, (NUM_TOKENS // SEQ_LEN, SEQ_LEN), generator=torch.Generator().manual_seed(0)
    )
    with PeakSampler() as sampler:
        cache = folder.with_name(folder.name + "-cache")
        watch = _timed(log, "calibrate", sampler, baseline)
        statistics = calibrate(model, tokens, cache=cache, progress=watch)
        plan = uniform_plan(model)
        packed = folder.with_name(folder.name + "-packed")
        if not packed.exists():
            pack(model, plan, packed, statistics=statistics, progress=_timed(log, "pack", sampler, baseline))
    print(write_results("packing", figures_of(model, log, baseline)))


def figures_of(model: Model, log: Path, baseline: int) -> dict[str, Any]:
    """Seconds of all steps, and of the whole shape where fewer layers were run."""
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    packed = iter(model.weights)
    seconds = {"calibrate": {"outside": 0.0, "layers": 0.0}, "pack": {"outside": 0.0, "layers": 0.0}}
    for step in steps:
        inside = "layer" in step["step"] if step["job"] == "calibrate" else next(packed).layer is not None
        seconds[step["job"]]["layers" if inside else "outside"] += step["seconds"]
    times = int(CONFIG["num_hidden_layers"]) / model.num_layers  # type: ignore[call-overload]
    whole = {job: row["outside"] + row["layers"] * times for job, row in seconds.items()}
    return {
        "calibration_tokens": NUM_TOKENS,
        "threads": torch.get_num_threads(),
        "layers_run": model.num_layers,
        "seconds_measured": seconds,
        "seconds_of_the_whole": {**whole, "total": sum(whole.values())},
        "peak_bytes_over_baseline": max(s["peak_bytes_over_baseline"] for s in steps),
        "baseline_bytes": baseline,
        "steps": steps,
    }


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
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/llama-1.1b"))
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    given = parser.parse_args()
    main(given.folder, given.layers)
