"""A training workload in a process of its own, measured by instruments that predict nothing.

`python -m haversack.jobs.training_run process CONFIG WORKLOAD` asks the operating system for the process's pages;
`... tensors CONFIG WORKLOAD` reads the allocator's own reports (torch's profiler). CONFIG is a model's config.json or its
folder, WORKLOAD a JSON file as `to_dict` writes it. Either prints one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haversack.jobs import memory
from haversack.jobs.measured_run import memory_events

if TYPE_CHECKING:
    import torch

    from haversack.describe.workload import TrainingWorkload
    from haversack.engine.adapters import ReadMatrix

MEASURED_STEPS = 2
"""The first step makes the optimizer's states, the second has them from its beginning: every later one is alike."""

_WARM_UP = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 32,
}


def measure_process(source: str | dict[str, Any], workload: TrainingWorkload) -> dict[str, Any]:
    """Build and train: private pages after imports and at their peak, and seconds of the last step."""
    memory.return_freed_memory()
    import_runtime(workload)
    imported = memory.private_bytes()
    has_files = isinstance(source, str) and any(Path(source).glob("*.safetensors"))
    with memory.PeakSampler(files_stay=not has_files) as sampler:
        step, batches = _prepare(source, workload)
        for _ in range(MEASURED_STEPS):
            started = time.perf_counter()
            loss = step.run(batches)
            seconds = time.perf_counter() - started
    return {
        "imported_private_bytes": imported,
        "peak_private_bytes": sampler.peak_bytes,
        "seconds_per_step": seconds,
        "loss": loss,
    }


def measure_tensors(source: str | dict[str, Any], workload: TrainingWorkload) -> dict[str, Any]:
    """Build, train and evaluate a batch under torch's profiler: the most bytes allocated, when, and what stays by owner."""
    import torch

    import_runtime(workload)
    phases: list[str] = []

    def begin(phase: str) -> None:
        phases.append(phase)
        with torch.profiler.record_function(phase):
            pass

    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        begin("load")
        step, batches = _prepare(source, workload)
        for number in range(MEASURED_STEPS):
            begin(f"step {number}")
            for batch in batches:
                step.micro_step(**batch)
            begin(f"update {number}")
            step.update()
        begin("evaluate")
        step.model.eval()
        with torch.no_grad():
            step.loss(**batches[0])
    # By the profiler's own clock: another may differ by as much as lies between a phase's last release and the next one's beginning.
    marks = {e.name(): e.start_ns() for e in profile.profiler.kineto_results.events() if e.name() in phases}
    peaks = dict.fromkeys(phases, 0)
    order = sorted(marks.items(), key=lambda item: item[1])
    live = 0
    starts = [(start, 0) for start in marks.values()]  # a phase that allocates nothing holds what it began with
    for moment, num_bytes in sorted([*memory_events(profile), *starts]):
        live += num_bytes
        phase = next((name for name, start in reversed(order) if moment >= start), order[0][0])
        peaks[phase] = max(peaks[phase], live)
    return {
        "tensor_peaks": peaks,
        "residents": {
            owner: sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
            for owner, tensors in step.residents().items()
        },
    }


def _prepare(source: str | dict[str, Any], workload: TrainingWorkload) -> tuple[Any, list[dict[str, Any]]]:
    """The training step, and the seeded random batches of one step; where answers are compared, each row is a pair."""
    import torch

    from haversack.describe.model import describe_model
    from haversack.engine.training_step import DTYPES, TrainingStep

    described = describe_model(source)
    model, read = open_for(described, workload, DTYPES[workload.weights_dtype])
    generator = torch.Generator().manual_seed(0)
    shape = (workload.batch_size, workload.seq_len)
    step = TrainingStep(model, described, workload, read=read).begin(described)
    batches: list[dict[str, Any]] = []
    for _ in range(workload.accumulation_steps):
        ids = torch.randint(described.vocab_size, shape, generator=generator)
        batches.append({"ids": ids, **({} if step.preference is None else _pair_in_each_row(ids))})
    return step, batches


def _pair_in_each_row(ids: torch.Tensor) -> dict[str, Any]:
    """Half of each row is one answer, the rest the other; nothing was preferred before."""
    import torch

    from haversack.engine.pairs import Pairs

    rows, length = ids.shape
    place = torch.arange(length)
    half = (place >= length // 2).long()
    positions = (place - half * (length // 2)).repeat(rows, 1)
    sequences = half + 2 * torch.arange(rows)[:, None]
    return {"positions": positions, "pairs": Pairs(sequences, rows, torch.zeros(2 * rows))}


def open_for(
    described: Any, workload: TrainingWorkload, dtype: torch.dtype, *, seed: int = 0
) -> tuple[Any, ReadMatrix | None]:
    """The model, and, where its matrices will be packed one by one, what reads them: they were left on meta then."""
    from haversack.describe.checkpoint import holds_weights
    from haversack.describe.workload import PACKED
    from haversack.engine.adapters import reads_one_by_one
    from haversack.engine.whole import load_to_pack

    packs = getattr(workload, "method", None) in PACKED or workload.precision == "int8"
    if packs and reads_one_by_one(described):
        if holds_weights(described.folder):
            return load_to_pack(described, dtype=dtype, attention=workload.attention)
        return _random_to_pack(described, dtype, workload.attention, seed)
    return open_model(described, dtype, workload.attention, seed=seed), None


def _random_to_pack(described: Any, dtype: torch.dtype, attention: str, seed: int) -> tuple[Any, ReadMatrix]:
    """Random weights of a config: all but the linears of the layers, which are made as they are asked for."""
    import torch

    from haversack.describe.skeleton import build_skeleton
    from haversack.engine.adapters import whole_linears

    generator = torch.Generator().manual_seed(seed)
    model: Any = build_skeleton(described.config, described.name)
    model.to(dtype)
    shapes = {
        f"{site.module}.weight": module.get_parameter("weight").shape
        for site, module in whole_linears(model, described)
    }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in shapes:
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            made = torch.empty(tensor.shape, dtype=tensor.dtype)
            kept = owner._parameters if leaf in owner._parameters else owner._buffers
            kept[leaf] = torch.nn.Parameter(made) if leaf in owner._parameters else made
        else:
            tensor._is_hf_initialized = True
    model.tie_weights()
    model.initialize_weights()
    model.set_attn_implementation(attention)
    spread = getattr(model.config, "initializer_range", 0.02)
    return model, lambda name: torch.empty(shapes[name], dtype=dtype).normal_(0.0, spread, generator=generator)


def open_model(described: Any, dtype: torch.dtype, attention: str, *, seed: int = 0) -> Any:
    """The model with its folder's weights, or with random ones by `seed` where there is a config alone."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from haversack.describe.checkpoint import holds_weights
    from haversack.engine.whole import load_whole

    torch.manual_seed(seed)
    if holds_weights(described.folder):
        return load_whole(described, dtype=dtype, attention=attention)
    config = CONFIG_MAPPING[described.model_type].from_dict(dict(described.config))
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def import_runtime(workload: TrainingWorkload) -> None:
    """What training imports is the runtime's, so a small model of another kind trains before the first look."""
    step, batches = _prepare(_WARM_UP, _small(workload))
    step.run(batches)


def _small(workload: TrainingWorkload) -> TrainingWorkload:
    recompute = "none" if workload.recompute == "none" else "full"  # the small model has other layers
    return dataclasses.replace(workload, batch_size=1, seq_len=2, recompute=recompute)


def runtime_private_bytes(workload: TrainingWorkload | None = None) -> int:
    """What this process holds privately once everything that planning and training import is there, and one small step of the workload
    was traced and run."""
    from haversack.cost.training import training_cost
    from haversack.describe.model import describe_model
    from haversack.describe.workload import TrainWorkload

    memory.return_freed_memory()
    workload = workload or TrainWorkload(1, 2)
    training_cost(describe_model(_WARM_UP), _small(workload))
    import_runtime(workload)
    return memory.private_bytes()


def main(arguments: list[str]) -> None:
    from haversack.describe.workload import TrainingWorkload, workload_from_dict

    instrument = {"process": measure_process, "tensors": measure_tensors}[arguments[0]]
    workload = workload_from_dict(json.loads(Path(arguments[2]).read_text()))
    assert isinstance(workload, TrainingWorkload)
    print(json.dumps(instrument(arguments[1], workload)))


if __name__ == "__main__":
    main(sys.argv[1:])
