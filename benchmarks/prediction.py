"""Random training and tuning configurations, predicted before anything is built, against fresh processes.

`python -m benchmarks.prediction` resumes where it stopped: each configuration leaves one line in `build/prediction/prediction.jsonl`, the last one of a seed
counts. `--seeds 25,32` runs these again; several such commands share the work. The tensor peak is measured by torch's profiler; the process's by the
operating system, in a second process, where the model's own bytes are at least three times the import baseline. Few of the 200 are so large, so that seeds from
1,000 on draw large ones alone, of which only the process is measured.

A fresh process is a fork of one that has imported torch and transformers and started no thread, so that hundreds of
configurations don't import them hundreds of times; what it holds when it begins is its baseline.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results_file import write_results
from haversack.cost.training import SLACK_FRACTION, training_cost
from haversack.describe.model import describe_model
from haversack.describe.workload import TrainingWorkload, TrainWorkload, TuneWorkload
from haversack.errors import HaversackError

SIZES = ((128, 4, 2), (256, 4, 4), (384, 6, 6), (512, 8, 8), (768, 12, 12))
"""Hidden size, heads and layers; the last, with its vocabulary, is some 150 million parameters."""

FOLDER = Path("build/prediction")

NUMBER, FIRST_LARGE, NUMBER_LARGE = 200, 1000, 24

BIG_PARAMETERS = 60_000_000
LIMIT_TOKENS, LIMIT_BIG_TOKENS = 1024, 128


def draw(seed: int) -> tuple[dict[str, Any], TrainingWorkload]:
    """One random configuration: family, size, precision, task, batch, length, optimizer, recomputation, adapter."""
    r = random.Random(seed)
    family = r.choice(
        [
            "llama",
            "qwen2",
            "qwen3",
            "mistral",
            "gemma2",
            "gemma3_text",
            "phi3",
            "gpt2",
            "olmo2",
            "opt",
            "gpt_neox",
            "mixtral",
        ]
    )
    large = seed >= FIRST_LARGE
    hidden, heads, layers = r.choices(SIZES, weights=(0, 0, 0, 0, 1) if large else (3, 3, 3, 2, 1))[0]
    layers = max(2, layers + r.choice((-1, 0, 1)))
    vocabulary = r.choice((32000, 50257) if large else (2000, 8000, 32000, 50257))
    config = {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": hidden * r.choice((2, 3, 4)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": r.choice([k for k in (1, 2, heads) if heads % k == 0]),
        "vocab_size": vocabulary,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": r.random() < 0.5,
        "pad_token_id": 0,
    }
    if family == "gpt2":
        config = {"model_type": family, "n_embd": hidden, "n_layer": layers, "n_head": heads, "vocab_size": vocabulary}
    elif family == "opt":
        config |= {"ffn_dim": config["intermediate_size"], "word_embed_proj_dim": hidden}
    elif family == "mixtral":
        config |= {"num_local_experts": 4, "intermediate_size": hidden}
    elif family.startswith("gemma"):
        config |= {"head_dim": hidden // heads, "sliding_window": 64}
    big = hidden * (vocabulary * 2 + 12 * hidden * layers) > BIG_PARAMETERS
    tokens = LIMIT_BIG_TOKENS if big else LIMIT_TOKENS
    length = r.choice([n for n in (32, 64, 100, 128, 256, 512) if n <= tokens])
    common = {
        "batch_size": r.randint(1, max(1, min(8, tokens // length))),
        "seq_len": length,
        "accumulation_steps": r.choices((1, 2), weights=(5, 1))[0],
        "precision": r.choice(("fp32", "bf16", "autocast")),
        "optimizer": r.choice(("adamw", "adamw", "adamw8bit", "sgdm", "adafactor", "muon")),
        "recompute": r.choice(("none", "none", "full")),
        "attention": "eager" if family == "gemma2" else r.choice(("sdpa", "eager")),
    }
    task = r.choice(("train", "tune full", "lora", "lora", "qlora")[: 2 if large else 5])
    if task in ("train", "tune full") and r.random() < 0.25:
        common["precision"] = "master"
    if task == "train":
        return config, TrainWorkload(**common)
    rank, targets = r.choice((4, 8, 16, 64)), r.choice(("attention", "linear"))
    method = "full" if task == "tune full" else task
    return config, TuneWorkload(**common, method=method, lora_rank=rank, lora_targets=targets)


def in_fresh_process(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns in a fork of this process; RuntimeError with its last words if it fails."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = work()
        except BaseException:
            answer = {"error": traceback.format_exc()[-600:]}
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(answer))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    answer = json.loads(text or '{"error": "the process died"}')
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer


def run_case(seed: int) -> dict[str, Any]:
    """Predict and measure one configuration."""
    from haversack.jobs.training_run import measure_process, measure_tensors

    config, workload = draw(seed)
    row: dict[str, Any] = {"seed": seed, "config": config, "workload": workload.to_dict()}
    began = time.process_time()
    try:
        cost = training_cost(describe_model(config), workload)
    except HaversackError as error:
        return row | {"refused": str(error)}
    row["predicted"] = {"tensor_peak_bytes": cost.tensor_peak_bytes, "point": cost.ledger().peak()[0]}
    row["predicted"]["points"] = {p: cost.ledger().total_bytes(p) for p in cost.ledger().timeline}
    row["predicting_cpu_seconds"] = time.process_time() - began
    if seed < FIRST_LARGE:
        tensors = in_fresh_process(lambda: measure_tensors(config, workload))
        peak = max(tensors["tensor_peaks"].values())
        row["measured"] = tensors
        row["tensor_error"] = cost.tensor_peak_bytes / peak - 1
    own = sum(cost.staying.values()) + cost.trace.gradient_bytes
    if own >= 3 * 250 * 2**20:  # close to three baselines: measured, and judged by its own baseline later
        process = in_fresh_process(lambda: measure_process(config, workload))
        over = process["peak_private_bytes"] - process["imported_private_bytes"]
        row["process"] = process | {"own_bytes": own}
        row["process_error"] = cost.tensor_peak_bytes * (1 + SLACK_FRACTION) / over - 1
    return row


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and 95th percentiles of the absolute errors, and every miss by its seed."""
    errors = sorted(abs(row["tensor_error"]) for row in rows if "tensor_error" in row)
    judged = [
        r for r in rows if "process" in r and r["process"]["own_bytes"] >= 3 * r["process"]["imported_private_bytes"]
    ]
    process = sorted(abs(row["process_error"]) for row in judged)

    def at(values: list[float], share: float) -> float | None:
        return values[min(len(values) - 1, int(share * len(values)))] if values else None

    return {
        "configurations": len(errors),
        "tensor_median": statistics.median(errors) if errors else None,
        "tensor_95th": at(errors, 0.95),
        "tensor_worst": errors[-1] if errors else None,
        "misses_over_3_percent": [row["seed"] for row in rows if abs(row.get("tensor_error", 0)) > 0.03],
        "process_configurations": len(process),
        "process_median": statistics.median(process) if process else None,
        "process_95th": at(process, 0.95),
        "process_worst": process[-1] if process else None,
        "refused": {row["seed"]: row["refused"] for row in rows if "refused" in row},
        "failed": {row["seed"]: row["failed"] for row in rows if "failed" in row},
    }


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main(seeds: Sequence[int] | None) -> None:
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401

    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / "prediction.jsonl"
    for seed in seeds or (*range(NUMBER), *range(FIRST_LARGE, FIRST_LARGE + NUMBER_LARGE)):
        if seeds is None and seed in {row["seed"] for row in _rows(file)}:
            continue
        try:
            row = run_case(seed)
        except RuntimeError as error:
            row = {"seed": seed, "failed": str(error)}
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(seed, f"{row.get('tensor_error', float('nan')):.3%}", row.get("process_error"), flush=True)
    rows = [row for _, row in sorted({row["seed"]: row for row in _rows(file)}.items())]
    figures = {"summary": summarise(rows), "rows": rows}
    print(json.dumps(figures["summary"], indent=1))
    if seeds is None:
        print(write_results("prediction", figures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")])
    main(parser.parse_args().seeds)
