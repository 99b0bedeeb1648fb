"""Tensor bytes, declared before anything loads against the allocator's reports: every resident and time point, models A and B and three families made from their configs.

Weights in 4 bits (nearest), keys and values in 4, prefill in one chunk. A resident's bytes are counted on the storages that
are there; what runs (activations, workspace, what generation keeps) is the allocator's peak of the time point less the
residents. `python -m benchmarks.exact_bytes [FOLDER]`
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.finished_rows import FinishedRows
from benchmarks.results_file import write_results
from benchmarks.streaming import CONFIG, make_model
from haversack import data
from haversack.cost.damage import NONE
from haversack.cost.serving import REST_FILE
from haversack.describe.machine import Machine
from haversack.describe.model import Model, describe_model
from haversack.describe.workload import ServeWorkload
from haversack.jobs.pack import pack
from haversack.jobs.verify import verify
from haversack.parts.kv.base import KVOption
from haversack.parts.kv.quantized import QuantizedKV
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.plan.make import make_plan
from haversack.plan.question import Question
from haversack.plan.schema import Plan

SMALL = {
    **CONFIG,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8000,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {
        **SMALL,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "tie_word_embeddings": True,
    },
    "phi3": {
        **SMALL,
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "num_key_value_heads": 8,
        "pad_token_id": 0,
        "sliding_window": 2048,
    },
    "gemma2": {
        **SMALL,
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "query_pre_attn_scalar": 64,
        "sliding_window": 256,
        "tie_word_embeddings": True,
    },
}
WORKLOADS = {
    "short": ServeWorkload(60, 24, prefill_chunk_tokens=60),
    "long": ServeWorkload(444, 64, prefill_chunk_tokens=444),
}
"""With both, a group of tokens leaves the ring within the steps that are measured."""

WEIGHTS = WeightOption(IntegerGrid(4, 64, symmetric=False, search=False), NearestRounding())
CACHE = KVOption(None, QuantizedKV(4, 4, 32, 32))
TRANSIENT = ("activations", "workspace", "generation", REST_FILE)
"""Owners that a run holds for a while, and what is mapped beside tensors."""


def measure(model: Model, workload: ServeWorkload, folder: Path) -> list[dict[str, Any]]:
    """Plan, pack, and run in a process of its own: `time point`, `resident`, `predicted`, `measured` in bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    answer = make_plan(
        Question(
            model=model,
            workload=workload,
            machine=Machine("as little as is needed", 2, 2**33, 2**33),
            budget_bytes=None,
            budget_kind="tensor",
            max_damage=0.0,  # every option costs nothing here, so that the fewest bytes are taken
            weight_damages={site.id: {WEIGHTS: NONE, WeightOption(): NONE} for site in model.weights},
            kv_damages={site.id: {CACHE: NONE, KVOption(): NONE} for site in model.attention},
            placement="resident",
        )
    )
    pack(model, answer.plan, folder)
    measured = verify(folder, quality=False)["measured"]
    rows = byte_rows(answer.plan, measured)
    shutil.rmtree(folder)
    return rows


def byte_rows(plan: Plan, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per time point and resident, then what runs at that time point."""
    rows = []
    for point, peak in measured["tensor_peaks"].items():
        owners = {owner: tiers.get("device", 0) for owner, tiers in plan.prediction.timeline[point].items()}
        found = {owner: num_bytes for owner, num_bytes in measured["residents"].items() if owner in owners}
        for owner, num_bytes in found.items():
            rows.append({"point": point, "resident": owner, "predicted": owners[owner], "measured": num_bytes})
        running = sum(owners.get(owner, 0) for owner in TRANSIENT)
        rows.append(
            {"point": point, "resident": "what runs", "predicted": running, "measured": peak - sum(found.values())}
        )
    return rows


def main(folder: Path) -> None:
    sources = "".join(path.read_text() for path in sorted(Path("src/haversack").rglob("*.py")))
    code = hashlib.sha256((sources + Path(__file__).read_text()).encode()).hexdigest()
    finished = FinishedRows("exact_bytes")
    figures = []
    models = {f"reference-{name}": data.reference_model(name) for name in ("a", "b")}
    models |= {name: make_model(folder / name, config) for name, config in FAMILIES.items()}
    for name, path in models.items():
        for length, workload in WORKLOADS.items():
            key = [name, FAMILIES.get(name), length, code]
            rows = finished.get(
                key, lambda p=path, w=workload: measure(describe_model(p), w, folder / f"{p.name}-packed")
            )
            figures += [{"model": name, "workload": length, **row} for row in rows]
            print(name, length, rows[-1], flush=True)
    columns = ["model", "tokens", "time point", "resident", "predicted, B", "allocator, B", "difference, B"]
    table = [
        [
            row["model"],
            f"{WORKLOADS[row['workload']].prompt_tokens} + {WORKLOADS[row['workload']].generate_tokens}",
            row["point"],
            row["resident"],
            f"{row['predicted']:,}",
            f"{row['measured']:,}",
            "equal" if row["predicted"] == row["measured"] else f"{row['measured'] - row['predicted']:+,}",
        ]
        for row in figures
    ]
    title = "Predicted before anything loaded, and what the allocator reported"
    print(write_results("exact_bytes", figures, tables=[{"title": title, "columns": columns, "rows": table}]))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/exact-bytes"))
