"""Decoding speed of other tools on the 1.1B Llama shape with random weights, in processes that take turns.

Contenders are llama.cpp Q4_0 and Q4_K_M, OpenVINO int4, torchao int4 and transformers in bfloat16: tokens/s for one and for eight sequences
with 64 tokens before them, a prefill of 512 tokens, and one sequence after 8,192 tokens with llama.cpp's smaller caches. Every round runs each
contender once in a process of its own; a figure is the median over rounds of the medians over steps.

    python -m benchmarks.decode_peers [--cases NAME ...] [--only CONTENDER ...] [--rounds 3] [--threads 2]

Finished rounds are kept, so that a run may be cut into pieces; what is missing at the end is an error. `measure` runs one round of one
contender for other benchmarks to alternate with.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import peer
from benchmarks.finished_rows import FOLDER, FinishedRows, digest
from benchmarks.results_file import busy_share, write_results
from benchmarks.streaming import CONFIG, make_model

Settings = Mapping[str, Any]

CONTENDERS: dict[str, tuple[str, Settings]] = {
    "llama.cpp Q4_0": ("llama_cpp", {"format": "Q4_0", "kv": "f16", "flash_attention": True}),
    "llama.cpp Q4_K_M": ("llama_cpp", {"format": "Q4_K_M", "kv": "f16", "flash_attention": True}),
    "OpenVINO int4": ("openvino", {"format": "int4"}),
    "torchao int4": ("torchao", {"format": "int4"}),
    "transformers bf16": ("transformers", {}),
    "llama.cpp Q4_0, q8_0 cache": ("llama_cpp", {"format": "Q4_0", "kv": "q8_0", "flash_attention": True}),
    "llama.cpp Q4_0, q4_0 cache": ("llama_cpp", {"format": "Q4_0", "kv": "q4_0", "flash_attention": True}),
}
"""Name -> peer and settings."""

CASES: dict[str, Settings] = {
    "batch 1": {"batch": 1, "context": 64, "prefill": 512, "tokens": 24, "repeats": 3},
    "batch 8": {"batch": 8, "context": 64, "prefill": 0, "tokens": 12, "repeats": 0},
    "context 8192": {"batch": 1, "context": 8192, "prefill": 0, "tokens": 16, "repeats": 0},
}

SHORT = ("llama.cpp Q4_0", "llama.cpp Q4_K_M", "OpenVINO int4", "torchao int4", "transformers bf16")
RUNS = {
    "batch 1": SHORT,
    "batch 8": SHORT,
    "context 8192": ("llama.cpp Q4_0", "llama.cpp Q4_0, q8_0 cache", "llama.cpp Q4_0, q4_0 cache"),
}
"""Which contenders run a case."""


def measure(contender: str, case: str, num_threads: int, folder: Path = Path("build/llama-1b")) -> dict[str, Any]:
    """One round: the peer's answer, with how busy others kept the machine. Raises PeerError."""
    name, settings = CONTENDERS[contender]
    config = {**CONFIG, "rope_theta": CONFIG["rope_parameters"]["rope_theta"]}
    request = {
        "task": "speed",
        "model": str(make_model(folder, CONFIG).resolve()),
        "folder": str(FOLDER.resolve()),
        "config": config,
        "num_threads": num_threads,
        "settings": {**CASES[case], **settings},
    }
    (answer,) = peer.run_peer(name, [request], num_threads=num_threads)
    return {**answer, "load_average": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    rows = FinishedRows("decode_peers")

    def key(contender: str, case: str, turn: int) -> list[Any]:
        name, settings = CONTENDERS[contender]
        return [peer.fingerprint(name), dict(settings), CASES[case], CONFIG, arguments.threads, turn]

    for turn in range(arguments.rounds):
        for case in arguments.cases:
            for contender in RUNS[case]:
                if contender in arguments.only and key(contender, case, turn) not in rows:
                    answer = measure(contender, case, arguments.threads)
                    rows.put(key(contender, case, turn), {**answer, "busy": round(busy_share(), 2)})
                    step = statistics.median(answer["step_seconds"])
                    print(f"{case}: {contender}, {CASES[case]['batch'] / step:.2f} tokens/s", flush=True)
    figures, table = [], []
    for case, contenders in RUNS.items():
        for contender in contenders:
            keys = [key(contender, case, turn) for turn in range(arguments.rounds)]
            done = [rows.rows[digest(found)] for found in keys if found in rows]
            if len(done) < arguments.rounds:
                print(f"{case}: {contender} has {len(done)} of {arguments.rounds} rounds; no results written")
                return
            figures.append(summary(contender, case, done))
            row = figures[-1]
            prefill = f"{row['prefill_tokens_per_second']:.1f}" if "prefill_tokens_per_second" in row else ""
            gigabytes = f"{row['weight_bytes'] / 1e9:.3f}"
            table.append([case, contender, f"{row['tokens_per_second']:.2f}", prefill, gigabytes])
    columns = ["case", "contender", "tokens/s", "prefill tokens/s", "weights, GB"]
    title = f"1.1B Llama shape, {arguments.threads} threads"
    print(write_results("decode_peers", figures, tables=[{"title": title, "columns": columns, "rows": table}]))


def summary(contender: str, case: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, and what was counted."""
    steps = [statistics.median(row["step_seconds"]) for row in rounds]
    prefills = [statistics.median(row["prefill_seconds"]) for row in rounds if row["prefill_seconds"]]
    figure = {
        "case": case,
        "contender": contender,
        "settings": dict(CONTENDERS[contender][1]) | dict(CASES[case]),
        "versions": rounds[0]["versions"],
        "weight_bytes": rounds[0]["weight_bytes"],
        "step_seconds_by_round": steps,
        "tokens_per_second": CASES[case]["batch"] / statistics.median(steps),
        "busy_by_round": [row["busy"] for row in rounds],
    }
    if prefills:
        figure["prefill_tokens_per_second"] = CASES[case]["prefill"] / statistics.median(prefills)
    return figure


if __name__ == "__main__":
    main()
