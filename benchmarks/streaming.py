"""A 1.1B model in bfloat16 generates under a 1 GiB tensor budget by streaming: peak and tokens/s, predicted against measured.

Makes the model from its config (random weights) under `build/`, measures the disk it lies on, packs it with `--placement streamed`, and verifies.
`python -m benchmarks.streaming [FOLDER]`
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.results_file import write_results
from haversack.cli.app import run
from haversack.describe.machine import Machine, measured
from haversack.describe.measure_machine import DISK_BYTES, disk_rates
from haversack.describe.model import Model, describe_model
from haversack.formats.safetensors_file import SafetensorsWriter
from haversack.jobs.verify import verify
from haversack.ledger import StoredTensor

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


def measured_beside(folder: Path) -> Machine:
    """This machine with its disk measured now: a disk that is shared is not always as fast as it once was."""
    machine = measured(disk_path=folder)
    rate, method = disk_rates(folder.parent, DISK_BYTES, [])
    return replace(machine, rates=replace(machine.rates, disk_read_bytes_per_second=rate, disk_read_method=method))


def _checkpoint_tensors(described: Model) -> list[StoredTensor]:
    """The checkpoint's tensors under their own names: sites that are parts of one tensor make it whole again."""
    shapes: dict[str, tuple[int, ...]] = {}
    for source in described.sources.values():
        shapes |= {block.tensor: block.source_shape for block in source.blocks}
    return [StoredTensor(name, described.dtype, shape) for name, shape in shapes.items()]


def main(folder: Path) -> None:
    model = make_model(folder, CONFIG)
    packed = folder.with_name(folder.name + "-streamed")
    shutil.rmtree(packed, ignore_errors=True)
    machine = folder.with_name(folder.name + "-machine.json")
    machine.write_text(json.dumps(measured_beside(folder).to_dict()))
    where = ["--machine", str(machine), "--placement", "streamed", "--tensor-budget", "1GiB"]
    lengths = ["--prompt-tokens", "64", "--generate-tokens", "17"]
    code = run(["pack", str(model), *where, *lengths, "-o", str(packed)])
    assert code == 0, "packing failed"
    report = verify(packed, quality=False)
    print(
        write_results(
            "streaming", {key: report[key] for key in ("within_budget", "peak_bytes", "bytes", "seconds", "figures")}
        )
    )
    for row in report["bytes"] + report["figures"]:
        print(row)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/llama-1b"))
