"""The peak of the whole process, predicted before anything loads against the operating system's figure: three families of 1 to
2 GiB, resident in 16 bits.

The error is |predicted - measured| over (peak - private bytes after imports). `python -m benchmarks.process_peak [FOLDER]`
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.results_file import write_results
from benchmarks.streaming import CONFIG, make_model
from haversack.cli.app import run
from haversack.jobs.verify import verify

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": CONFIG,
    "qwen3": {
        **CONFIG,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 12,
        "head_dim": 64,
        "intermediate_size": 6144,
        "tie_word_embeddings": True,
    },
    "phi3": {
        **CONFIG,
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "num_hidden_layers": 10,
        "num_key_value_heads": 32,
        "pad_token_id": 0,
        "sliding_window": 2048,
    },
}


def main(folder: Path) -> None:
    figures = []
    for family, config in FAMILIES.items():
        model = make_model(folder / family, config)
        packed = folder / f"{family}-16"
        shutil.rmtree(packed, ignore_errors=True)
        code = run(
            [
                "pack",
                str(model),
                "--budget",
                "6GiB",
                "--prompt-tokens",
                "64",
                "--generate-tokens",
                "9",
                "-o",
                str(packed),
            ]
        )
        assert code == 0, f"packing {family} failed"
        report = verify(packed, quality=False)
        rows = {row["what"]: row for row in report["bytes"]}
        peak, imported = rows["process peak (private)"], report["measured"]["imported_private_bytes"]
        error = abs(peak["measured"] - peak["predicted"]) / (peak["measured"] - imported)
        figures.append({"family": family, "error": error, "bytes": report["bytes"]})
        print(family, f"{error:.2%}", peak, flush=True)
        shutil.rmtree(packed)
    print(write_results("process_peak", figures))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/process-peak"))
