"""Fully sharded data parallel (FSDP2) on two processes of this machine: each rank's tensors, predicted against measured.

`python -m benchmarks.fsdp` starts both ranks (gloo, CPU); each builds a model of about 100M parameters, shards it layer by layer
and trains two steps under torch's profiler. The prediction comes from the config alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
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
)


def measure_rank(rank: int, store: str, workload: TrainingWorkload) -> dict[str, int]:
    """One rank's most bytes of tensors, by phase of the second step."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from haversack.describe.model import describe_model
    from haversack.engine.training_step import DTYPES, TrainingStep, inner_matrices
    from haversack.jobs.measured_run import memory_events
    from haversack.jobs.training_run import open_model

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    described = describe_model(CONFIG)
    marks: dict[str, int] = {}
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        marks["load"] = time.time_ns()
        model = open_model(described, DTYPES[workload.weights_dtype], workload.attention)
        step = TrainingStep(model, described, workload)
        inside = {id(parameter) for parameter in inner_matrices(model, described)}
        names = [name for name, parameter in model.named_parameters() if id(parameter) in inside]
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        sharded: dict[str, Any] = dict(model.named_parameters())
        local = {name: torch.nn.Parameter(parameter.to_local()) for name, parameter in sharded.items()}
        optimizer = step.optimizer_over(list(local.values()), [local[name] for name in names])
        ids = torch.randint(CONFIG["vocab_size"], (workload.batch_size, workload.seq_len))
        for number in range(2):
            marks[f"passes {number}"] = time.time_ns()
            step.micro_step(ids)
            marks[f"update {number}"] = time.time_ns()
            for name, parameter in sharded.items():
                local[name].grad = parameter.grad.to_local()
                parameter.grad = None
            optimizer.step()
    peaks, live = dict.fromkeys(marks, 0), 0
    order = sorted(marks.items(), key=lambda item: item[1])
    for moment, num_bytes in sorted(memory_events(profile)):
        live += num_bytes
        phase = next((name for name, begin in reversed(order) if moment >= begin), order[0][0])
        peaks[phase] = max(peaks[phase], live)
    dist.destroy_process_group()
    return peaks


def predict(workload: TrainingWorkload) -> dict[str, int]:
    """The same phases from the config."""
    from haversack.cost.parallel import rank_cost
    from haversack.describe.model import describe_model
    from haversack.describe.parallel import Parallelism

    ledger = rank_cost(describe_model(CONFIG), workload, Parallelism(data=RANKS, zero=3)).stages[0]
    passes = max(ledger.total_bytes(point) for point in ("forward", "loss", "backward"))
    return {"passes 1": passes, "update 1": ledger.total_bytes("update")}


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
        for rank, peaks in enumerate(measured):
            errors = {phase: value / peaks[phase] - 1 for phase, value in predicted.items()}
            peak = max(predicted.values()) / max(peaks[phase] for phase in predicted) - 1
            figures.append(
                {"workload": workload.to_dict(), "rank": rank, "predicted": predicted, "measured": peaks, "error": peak}
            )
            print(workload.task, rank, {phase: f"{error:+.2%}" for phase, error in errors.items()}, f"peak {peak:+.2%}")
    print(write_results("fsdp", figures))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        given = workload_from_dict(json.loads(sys.argv[3]))
        assert isinstance(given, TrainingWorkload)
        print(json.dumps(measure_rank(int(sys.argv[1]), sys.argv[2], given)))
    else:
        main()
