"""Fully sharded data parallel (FSDP2) on two processes of this machine: each rank's own bytes, predicted against measured.

`python -m benchmarks.fsdp` starts both ranks (gloo, CPU); each builds a model of about 100M parameters, shards it layer by layer
and trains two steps. The prediction comes from the config alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.results_file import write_results
from haversack.describe.workload import TrainingWorkload, TrainWorkload, TuneWorkload, workload_from_dict

RANKS = 2
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 12, "intermediate_size": 2048, "vocab_size": 8192, "max_position_embeddings": 512,
}  # fmt: skip
WORKLOADS: tuple[TrainingWorkload, ...] = (
    TrainWorkload(2, 128, precision="fp32"),
    TuneWorkload(2, 128, precision="fp32", method="full", recompute="full"),
    TuneWorkload(2, 128, precision="fp32", method="lora", lora_rank=16, lora_targets="attention"),
)


def measure_rank(rank: int, store: str, workload: TrainingWorkload) -> dict[str, int]:
    """One rank's private pages, after imports and at their peak over two steps.

    The operating system's figure, not torch's profiler: it does not see what gloo's threads give back.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from haversack.describe.model import describe_model
    from haversack.engine.training_step import DTYPES, TrainingStep, inner_matrices
    from haversack.jobs import memory
    from haversack.jobs.training_run import import_runtime, open_model

    torch.set_num_threads(1)
    memory.return_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    described = describe_model(CONFIG)
    import_runtime(workload)
    imported = memory.private_bytes()
    with memory.PeakSampler(files_stay=True) as sampler:
        model = open_model(described, DTYPES[workload.weights_dtype], workload.attention)
        step = TrainingStep(model, described, workload)
        inside = {id(parameter) for parameter in inner_matrices(model, described)}
        names = [name for name, parameter in model.named_parameters() if id(parameter) in inside]
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        sharded: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        local = {name: torch.nn.Parameter(parameter.to_local()) for name, parameter in sharded.items()}
        optimizer = step.optimizer_over(list(local.values()), [local[name] for name in names])
        ids = torch.randint(CONFIG["vocab_size"], (workload.batch_size, workload.seq_len))
        for _ in range(2):
            step.micro_step(ids)
            for name, parameter in sharded.items():
                local[name].grad = parameter.grad.to_local()
                parameter.grad = None
            optimizer.step()
    dist.destroy_process_group()
    return {"imported": imported, "own": sampler.peak_bytes - imported}


def predict(workload: TrainingWorkload) -> int:
    """A rank's own bytes at their peak from the config, the allocator's slack included."""
    from haversack.cost.parallel import rank_cost
    from haversack.cost.training import SLACK_FRACTION
    from haversack.describe.model import describe_model
    from haversack.describe.parallel import Parallelism

    ledger = rank_cost(describe_model(CONFIG), workload, Parallelism(data=RANKS, zero=3), on_host=True).stages[0]
    return round(ledger.peak()[1] * (1 + SLACK_FRACTION))


def main() -> None:
    figures = []
    for workload in WORKLOADS:
        predicted = predict(workload)
        with tempfile.TemporaryDirectory() as folder:
            asked = json.dumps(workload.to_dict())
            command = [sys.executable, "-m", "benchmarks.fsdp"]
            ranks = [
                subprocess.Popen([*command, str(rank), f"{folder}/store", asked], stdout=subprocess.PIPE, text=True)
                for rank in range(RANKS)
            ]
            measured = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
        for rank, found in enumerate(measured):
            error = predicted / found["own"] - 1
            row = {"task": workload.task, "recompute": workload.recompute, "rank": rank}
            figures.append({**row, "predicted": predicted, "measured": found["own"], "error": round(error, 4)})
            print(row, f"{predicted / 1e6:.1f} MB against {found['own'] / 1e6:.1f}: {error:+.2%}", flush=True)
    print(write_results("fsdp", figures))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        given = workload_from_dict(json.loads(sys.argv[3]))
        assert isinstance(given, TrainingWorkload)
        print(json.dumps(measure_rank(int(sys.argv[1]), sys.argv[2], given)))
    else:
        main()
