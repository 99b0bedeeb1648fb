"""Seconds of a decode step, predicted by the plan before anything is packed, against the packed folder's own run: ten configurations.

    python -m benchmarks.decode_time [--folder build/decode-time]

Two shapes with random weights, every matrix in one format, cache, users and context varied. The machine's rates are measured first
(`haversack machine --measure`); no constant is fitted to these rows. Needs a quiet machine: everything waits for memory.
Goals: rank correlation 0.95, median error 20%.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.finished_rows import FinishedRows
from benchmarks.results_file import write_results
from benchmarks.streaming import CONFIG, make_model
from benchmarks.weights import source_digest
from haversack.cost.damage import NONE, Damage
from haversack.describe import machine as machines
from haversack.describe.machine import Machine
from haversack.describe.model import describe_model
from haversack.describe.workload import ServeWorkload
from haversack.jobs.pack import pack
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.quantized import QuantizedKV
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.nearest import NearestRounding
from haversack.plan.make import make_plan
from haversack.plan.question import Question
from haversack.recipes.base import candidate_options
from haversack.units import format_seconds

SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": {**CONFIG, "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 20, "num_attention_heads": 24},
    "1.4B": {**CONFIG, "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 18, "num_attention_heads": 40},
}  # fmt: skip
GENERATED = 32


@dataclass(frozen=True)
class Case:
    """One configuration: `grid` is a weight option's grid by its label ("as is" for 16 bits), `cache_bits` of keys and values."""

    shape: str
    grid: str
    users: int = 1
    prompt_tokens: int = 64
    cache_bits: int = 16

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.grid}, {self.users} x {self.prompt_tokens} tokens, cache {self.cache_bits} bits"


CASES = (
    Case("0.6B", "as is"),
    Case("0.6B", "int8 g128"),
    Case("0.6B", "int4 g64"),
    Case("0.6B", "int4 g64", users=4),
    Case("0.6B", "int4 g64", prompt_tokens=3000),
    Case("0.6B", "int4 g64", prompt_tokens=3000, cache_bits=4),
    Case("1.4B", "as is"),
    Case("1.4B", "int8 g128"),
    Case("1.4B", "int2 g64"),
    Case("1.4B", "max4 g32 u4"),
)


def weight_option(grid: str) -> WeightOption:
    """Rounded to nearest, which is quick, whatever the recipe says of it."""
    if grid == "as is":
        return WeightOption()
    found = next(o.grid for o in candidate_options("weights", ()) if o.grid is not None and o.grid.label == grid)
    return WeightOption(grid=found, rounding=NearestRounding())


def run_case(case: Case, folder: Path, machine: Machine) -> dict[str, Any]:
    """Plan, pack into a folder of its own, run in a fresh process; the folder goes again."""
    model = describe_model(make_model(folder / case.shape, SHAPES[case.shape]))
    bits = case.cache_bits
    cache = KVOption() if bits == 16 else KVOption(None, QuantizedKV(bits, bits, 64, 64))
    question = Question(
        model=model,
        workload=ServeWorkload(case.prompt_tokens, GENERATED, case.users),
        machine=machine,
        budget_bytes=machine.available_bytes,
        budget_kind="tensor",
        weight_damages={site.id: {weight_option(case.grid): NONE} for site in model.weights},
        kv_damages={site.id: {KVOption(): Damage(1.0, "cited"), cache: NONE} for site in model.attention},
        placement="resident",
    )
    plan = make_plan(question).require_fit()
    packed = folder / "packed"
    shutil.rmtree(packed, ignore_errors=True)
    pack(model, plan, packed)
    command = [sys.executable, "-m", "haversack.jobs.measured_run", "process", str(packed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(packed)
    found = json.loads(done.stdout.splitlines()[-1])
    predicted, measured = plan.prediction.seconds_per_token, found["seconds_per_step"]
    return {
        "case": case.name,
        "predicted": predicted,
        "measured": measured,
        "error": predicted / measured - 1,
        "loop": found["loop"],
        "kernels": found["kernels"],
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlation (Spearman's) and the median of absolute errors."""
    from scipy.stats import spearmanr

    correlation = spearmanr([row["predicted"] for row in rows], [row["measured"] for row in rows]).statistic
    return {
        "configurations": len(rows),
        "rank_correlation": float(correlation),
        "median_error": statistics.median(abs(row["error"]) for row in rows),
    }


def table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the documentation shows."""
    return {
        "title": "Seconds of a decode step",
        "columns": ["configuration", "predicted", "measured", "error", "loop"],
        "rows": [
            [row["case"], format_seconds(row["predicted"]), format_seconds(row["measured"]), f"{row['error']:+.1%}", row["loop"]]
            for row in rows
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/decode-time"))
    parser.add_argument(
        "--first", type=int, default=len(CASES), help="Only so many configurations, and nothing is written."
    )
    arguments = parser.parse_args()
    machine = machines.measured(progress=lambda line: print(line, flush=True))
    finished = FinishedRows("decode_time")
    rows = []
    for case in CASES[: arguments.first]:
        key = [case.name, GENERATED, machine.rates.to_dict(), source_digest()]
        rows.append(finished.get(key, lambda case=case: run_case(case, arguments.folder, machine)))  # type: ignore[misc]
        print(rows[-1], flush=True)
    if len(rows) < len(CASES):
        return
    summary = summarise(rows)
    print(summary)
    print(write_results("decode_time", {"summary": summary, "rows": rows}, tables=[table(rows)]))


if __name__ == "__main__":
    main()
