"""A 1.1B model in bfloat16 generates under a 1 GiB tensor budget by streaming: peak and tokens/s, predicted against measured.

Makes the model from its config (random weights) under `build/` and packs it with its layers streamed; then, round after round, the disk is
read, the step predicted and the packed folder verified.
`python -m benchmarks.streaming [FOLDER]`
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.results_file import write_results
from haversack.describe.machine import Machine, measured
from haversack.describe.measure_machine import DISK_BYTES, file_read_rate
from haversack.describe.model import Model, describe_model
from haversack.describe.workload import ServeWorkload
from haversack.formats.safetensors_file import SafetensorsWriter
from haversack.jobs.pack import pack
from haversack.jobs.verify import verify
from haversack.ledger import StoredTensor
from haversack.plan.make import make_plan
from haversack.plan.question import Question
from haversack.units import format_seconds

ROUNDS = 7

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
"""The shape that decoding benchmarks use: 1.1 billion parameters."""


def make_model(folder: Path, config: dict[str, Any]) -> Path:
    """Write the folder tensor by tensor, never the whole model at once."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    described = describe_model(config)
    declared = _checkpoint_tensors(described)
    generator = torch.Generator().manual_seed(0)
    with SafetensorsWriter(folder / "model.safetensors", declared, metadata={"format": "pt"}) as writer:
        for tensor in declared:
            values = (
                torch.randn(tensor.shape, generator=generator) * 0.02
                if len(tensor.shape) > 1
                else torch.ones(tensor.shape)
            )
            writer.write(tensor.name, values.to(torch.bfloat16))
        writer.finish()
        writer.remove_journal()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _checkpoint_tensors(described: Model) -> list[StoredTensor]:
    """The checkpoint's tensors under their own names: sites that are parts of one tensor make it whole again."""
    shapes: dict[str, tuple[int, ...]] = {}
    for source in described.sources.values():
        shapes |= {block.tensor: block.source_shape for block in source.blocks}
    return [StoredTensor(name, described.dtype, shape) for name, shape in shapes.items()]


def with_disk(machine: Machine, bytes_per_second: float) -> Machine:
    """The machine with its disk as it was measured a moment ago."""
    return replace(machine, rates=replace(machine.rates, disk_read_bytes_per_second=bytes_per_second))


def run_round(question: Question, packed: Path) -> dict[str, Any]:
    """The disk read on its own, the step predicted from that, the run in a fresh process, and the disk once more.

    A disk that others share is not as fast at one minute as at the next, so each round predicts from its own moment.
    """
    file = max(packed.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    before, _ = file_read_rate(file, DISK_BYTES)
    predicted = make_plan(
        replace(question, machine=with_disk(question.machine, before))
    ).plan.prediction.seconds_per_token
    report = verify(packed, quality=False)
    after, _ = file_read_rate(file, DISK_BYTES)
    return {
        "disk_before": before,
        "disk_in_run": report["measured"]["disk_read_bytes_per_second"],
        "disk_after": after,
        "predicted": predicted,
        "measured": report["seconds"]["decode step"]["measured"],
        "within_budget": report["within_budget"],
        "peak_bytes": report["peak_bytes"],
        "bytes": report["bytes"],
        "kernels": report["kernels"],
    }


def table(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What the documentation shows."""

    def rate(value: float) -> str:
        return f"{value / 1e9:.2f}"

    return {
        "title": "A 1.1B model streamed: seconds of a decode step, predicted from the disk's rate a moment before (GB/s)",
        "columns": ["disk before", "disk in the run", "disk after", "predicted", "measured", "error of tokens/s"],
        "rows": [
            [
                *(rate(row[f"disk_{when}"]) for when in ("before", "in_run", "after")),
                format_seconds(row["predicted"]),
                format_seconds(row["measured"]),
                f"{row['measured'] / row['predicted'] - 1:+.1%}",
            ]
            for row in rounds
        ],
    }


def main(folder: Path) -> None:
    model = describe_model(make_model(folder, CONFIG))
    packed = folder.with_name(folder.name + "-streamed")
    shutil.rmtree(packed, ignore_errors=True)
    question = Question(
        model=model,
        workload=ServeWorkload(64, 17, 1),
        machine=measured(disk_path=folder),
        budget_bytes=1 << 30,
        budget_kind="tensor",
        placement="streamed",
    )
    pack(model, make_plan(question).require_fit(), packed)
    rounds = [run_round(question, packed) for _ in range(ROUNDS)]
    median_error = statistics.median(abs(row["measured"] / row["predicted"] - 1) for row in rounds)
    print(write_results("streaming", {"rounds": rounds, "median_error": median_error}, tables=[table(rounds)]))
    for row in table(rounds)["rows"]:
        print(*row)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/llama-1b"))
