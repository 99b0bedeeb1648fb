"""Published peaks of real systems against predictions: `python -m benchmarks.published ROWS.csv`.

`published.toml` holds the setting of rows whose words leave something out; other rows are read as they are (`benchmarks.published_words`). No constant here is fitted: formats are their makers', the rest is traced.
"""

from __future__ import annotations

import csv
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import litgpt
from benchmarks.published_words import read_setting
from benchmarks.results_file import write_results
from haversack.cost.parallel import rank_config
from haversack.cost.training import training_cost
from haversack.describe.model import Model, describe_model
from haversack.describe.parallel import Parallelism
from haversack.describe.site import WeightSite
from haversack.describe.skeleton import build_skeleton
from haversack.describe.workload import TuneWorkload
from haversack.engine.trace import LiveBytes
from haversack.errors import HaversackError, UsageError
from haversack.ledger import total_bytes

BYTES_PER_WEIGHT = {
    "BF16": 2.0,
    "nf4": 0.5 + 4 / 64,  # bitsandbytes: a float32 maximum per 64
    "fp4": 0.5 + 4 / 64,
    "nf4-dq": 0.5
    + 1 / 64
    + 4 / (64 * 256),  # maxima in 8 bits, with a float32 per 256 of them (arXiv 2305.14314, section 3)
    "int8": 1.0,
    "int4-g64": 0.5 + 4 / 64,  # gpt-fast: scale and zero in bf16 per group
}

CUBLAS_WORKSPACE_BYTES = 8_519_680
"""torch's default on GPUs before Hopper: `CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8`, in KiB."""

TOLERANCE = 0.10

COLUMNS = ("id", "kind", "task", "model", "setting", "metric", "value", "unit", "hardware", "source", "note")


def tune(row: dict[str, Any], model: Model) -> float:
    """litgpt's LoRA (`benchmarks.litgpt`): rank 8 on queries and values, AdamW, all in bfloat16, matrices in 4 bits where the row says so."""
    per_weight = BYTES_PER_WEIGHT[row["format"]] if "format" in row else None
    peak = litgpt.peak_bytes(model.config, batch_size=row["batch"], tokens=row["tokens"], bytes_per_weight=per_weight)
    return peak + CUBLAS_WORKSPACE_BYTES


def full(row: dict[str, Any], model: Model) -> float:
    """All weights tuned in bfloat16 with AdamW, several samples in each row, through transformers' model of the same shape."""
    workload = TuneWorkload(
        row["batch"], row["tokens"], method="full", samples_apart=True, recompute=row.get("recompute", "none")
    )
    ledger = training_cost(model, workload).ledger()
    return max(ledger.total_bytes(p) for p in ("forward", "loss", "backward", "update")) + CUBLAS_WORKSPACE_BYTES


def generate(row: dict[str, Any], model: Model) -> float:
    """Weights, keys and values of all tokens, the activations of a short prompt, and the largest matrix unpacked; where loading
    quantizes anew, its 16 bits and its new codes beside the old ones, if that is more."""
    tensor, stages = row.get("tensor", 1), row.get("stages", 1)
    if tensor > 1:
        model = describe_model(rank_config(model.config, Parallelism(tensor=tensor), model.name))
    fmt = row.get("format", "BF16")
    layers = sum(weight_bytes(s, fmt, fmt) for s in model.weights if s.layer is not None)
    outer = sum(weight_bytes(s, fmt, row.get("head", fmt)) for s in model.weights if s.layer is None)
    kv = sum(site.bytes_per_token() for site in model.attention) * row["tokens"]
    resident = layers / stages + outer + total_bytes(model.rest)
    widest = max(s.num_parameters for s in model.weights if s.role not in ("embedding", "position"))
    unpacked = 2.0 * widest if fmt != "BF16" and row.get("unpacks", True) else 0.0
    running = kv / stages + unpacked + passing_bytes(model, num_tokens=16) + CUBLAS_WORKSPACE_BYTES
    loading = (2.0 + BYTES_PER_WEIGHT[fmt]) * widest if row.get("requantizes") else 0.0
    return resident + max(running, loading)


def passing_bytes(model: Model, num_tokens: int) -> int:
    """The most that one forward pass allocates, traced through the unpacked model."""
    import torch

    skeleton: Any = build_skeleton(model.config, model.name).to(torch.bfloat16)
    ids = torch.zeros(1, num_tokens, dtype=torch.int64, device="meta")
    with torch.no_grad(), LiveBytes() as live:
        live.leave_out([*skeleton.parameters(), *skeleton.buffers()])
        skeleton(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return live.peak_bytes


def weight_bytes(site: WeightSite, fmt: str, head: str) -> float:
    """A matrix in a foreign format: embeddings stay in bfloat16, and tied heads with them."""
    if site.role in ("embedding", "position"):
        return 2.0 * site.num_parameters
    return BYTES_PER_WEIGHT[head if site.role == "head" else fmt] * site.num_parameters


def weights(row: dict[str, Any], model: Model) -> float:
    return 2.0 * model.num_parameters


def kv(row: dict[str, Any], model: Model) -> float:
    return sum(site.bytes_per_token() for site in model.attention) * row["tokens"]


def kv_latent(row: dict[str, Any], model: None) -> float:
    """One latent and one rotary key per layer and token in 16 bits."""
    return 2.0 * row["layers"] * row["width"] * row["tokens"]


def kv_heads(row: dict[str, Any], model: None) -> float:
    return 2.0 * row["layers"] * row["heads"] * row["width"] * row["bytes"] * row["tokens"]


def zero(row: dict[str, Any], model: None) -> float:
    from haversack.cost.parallel import sharded_bytes

    n, layout = int(row["parameters"]), Parallelism(data=row["ranks"], zero=row["stage"])
    owners = {"weights": 2 * n, "gradients": 2 * n, "master weights": 4 * n, "optimizer states": 8 * n}
    return float(sum(sharded_bytes(size, owner, layout) for owner, size in owners.items()))


def deepspeed(row: dict[str, Any], model: None) -> float:
    """Its own estimators of a GPU, which also count gradients in 32 bits: stage 2 with 4P + 16P/N, or 2P where the optimizer is offloaded; stage
    3 with 4L + 18P/N, 4L + 2P/N without the optimizer, 4L without parameters as well (`docs/code-docs/source/memory.rst`)."""
    n, ranks, offload = row["parameters"], row["ranks"], row.get("offload", "")
    if row["stage"] == 2:
        return 2 * n if offload else 4 * n + 16 * n / ranks
    return 4 * row["widest"] + {"": 18, "optimizer": 2, "all": 0}[offload] * n / ranks


RUNS: dict[str, Callable[[dict[str, Any], Any], float]] = {
    "tune": tune,
    "full": full,
    "generate": generate,
    "weights": weights,
    "kv": kv,
    "kv latent": kv_latent,
    "kv heads": kv_heads,
    "zero": zero,
    "deepspeed": deepspeed,
}


def score(published: Mapping[str, Mapping[str, str]], table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A figure for each row: predicted where its setting is known, or can be read from its own words; else why not."""
    for name, words in published.items():
        row: dict[str, Any] = table["rows"].get(name) or read_setting(words, table["models"])
        if row["kind"] in ("other", "dropped"):
            yield {"id": name, **row}
            continue
        try:
            model = describe_model(table["models"][row["model"]]["config"]) if "model" in row else None
            predicted = RUNS[row["run"]](row, model)
        except HaversackError as problem:
            yield {"id": name, **row, "kind": "dropped", "why": str(problem)}
            continue
        error = predicted / row["value"] - 1
        exact = row["kind"] != "formula" or abs(error) < 0.5 * 10.0 ** (1 - row["digits"])
        yield {"id": name, **row, "predicted": predicted, "error": error, "agrees": exact and abs(error) <= TOLERANCE}


def read_rows(file: Path) -> dict[str, dict[str, str]]:
    """Rows by their id. Raises DataError for a file without the columns that settings are read from."""
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise UsageError(f"{file} has no column {missing[0]!r}; rows need {', '.join(COLUMNS)}.")
        return {row["id"]: {name: text or "" for name, text in row.items() if name} for row in reader}


def main(file: Path) -> None:
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    figures = []
    for row in score(read_rows(file), table):
        figures.append(row)
        if "predicted" in row:
            sizes = f"{row['predicted'] / 1e9:.3f} GB against {row['value'] / 1e9:.3f}: {row['error']:+.2%}"
            print(row["id"], row["kind"], sizes, flush=True)
        else:
            print(row["id"], "not scored:", row["why"], flush=True)
    for kind in ("formula", "torch"):
        scored = [row for row in figures if row["kind"] == kind]
        print(kind, sum(row["agrees"] for row in scored), "of", len(scored))
    print(write_results("published", figures, tables=tables(figures)))


def tables(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the documentation shows: every row predicted, and by name those that are not scored or were dropped."""
    predicted = [row for row in figures if "predicted" in row]
    others = [row for row in figures if "predicted" not in row]
    scored = {kind: [row for row in predicted if row["kind"] == kind] for kind in ("formula", "torch")}
    counts = ", ".join(f"{kind} {sum(row['agrees'] for row in rows)} of {len(rows)}" for kind, rows in scored.items())
    return [
        {
            "title": f"Published peaks, predicted: {counts} agree",
            "columns": ["row", "kind", "run", "of", "predicted", "published", "error", "agrees", "why not"],
            "rows": [
                [row["id"], row["kind"], row["run"], row.get("model", ""), f"{row['predicted'] / 1e9:.3f} GB",
                 f"{row['value'] / 1e9:.3f} GB", f"{row['error']:+.2%}", "yes" if row["agrees"] else "no",
                 "" if row["agrees"] else row.get("miss", "")]
                for row in predicted
            ],
        },
        {
            "title": "Published peaks that are not scored",
            "columns": ["row", "kind", "why"],
            "rows": [[row["id"], row["kind"], row["why"]] for row in others],
        },
    ]  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
