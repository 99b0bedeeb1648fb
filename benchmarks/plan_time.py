"""Processor time from a cold start: `--help`, the import, and plans of large models from their configs alone, in fresh processes.

Contenders take turns; the median counts. Configs are written here from the published shapes. `python -m benchmarks.plan_time [TURNS]`
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.results_file import write_results

HAVERSACK = ("-m", "haversack")
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "70B": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "405B": {
        **_LLAMA,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
    },
    "gpt-oss-120b": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "dtype": "bfloat16",
    },
    "7B": {**_LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}  # fmt: skip
_RANKS = ("--batch", "1", "--context", "4096", "--with", "data=1024", "--with", "zero=3", "--with", "recompute=full")
CASES: dict[str, tuple[str, ...]] = {
    "--help": (*HAVERSACK, "--help"),
    "import haversack": ("-c", "import haversack"),
    "70B to serve": (*HAVERSACK, "plan", "70B", "--budget", "60GiB", "--context", "4096"),
    "gpt-oss-120b to serve": (*HAVERSACK, "plan", "gpt-oss-120b", "--budget", "75GiB", "--context", "4096"),
    "405B to train, ZeRO-3 on 1,024 ranks": (*HAVERSACK, "plan", "405B", "--task", "train", "--budget", "80GB", *_RANKS),
    "7B to tune by QLoRA, refused": (*HAVERSACK, "plan", "7B", "--task", "tune", "--budget", "4GiB", "--with", "method=qlora"),
}  # fmt: skip
GOAL_SECONDS = {
    "--help": 0.3,
    "import haversack": 0.3,
    "70B to serve": 5.0,
    "405B to train, ZeRO-3 on 1,024 ranks": 5.0,
}
"""What has a goal; the rest is for comparison."""


def main(turns: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    codes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in CONFIGS.items():
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "config.json").write_text(json.dumps(config))
        for _ in range(turns + 1):  # the first turn reads files into memory, and is not counted
            for name, arguments in CASES.items():
                spent, codes[name] = _processor_seconds(arguments, Path(folder))
                seconds[name].append(spent)
    figures = [
        {
            "case": name,
            "command": " ".join(CASES[name]),
            "exit_code": codes[name],
            "cpu_seconds": statistics.median(spent[1:]),
            "every_turn": spent,
            "goal_seconds": GOAL_SECONDS.get(name),
        }
        for name, spent in seconds.items()
    ]
    cells = [[row["case"], f"{row['cpu_seconds']:.2f}", f"{row['goal_seconds'] or ''}"] for row in figures]
    table = {"title": "Processor time from a cold start", "columns": ["what", "seconds", "goal"], "rows": cells}
    print(write_results("plan_time", figures, tables=[table]))


def _processor_seconds(arguments: tuple[str, ...], folder: Path) -> tuple[float, int]:
    """User and system seconds of a fresh process, and its exit code, which is 0 or the 1 of a plan that doesn't fit."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 1) or "Traceback" in done.stderr:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.strip()}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.returncode


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
