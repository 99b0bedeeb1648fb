"""The planned workload in a process of its own, measured by instruments that predict nothing.

`python -m haversack.jobs.measured_run process DIR` asks the operating system for the process's pages and times the run;
`... tensors DIR` reads the allocator's own reports (torch's profiler, whose own memory would spoil the first) and counts
each resident on the storages that are really there. Either prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haversack.jobs import memory

if TYPE_CHECKING:
    import torch

    from haversack.engine.decoder.loop import Decoder

PROFILED_TOKENS = 8
"""Decode steps under the profiler: every step allocates alike."""


def measure_process(folder: Path) -> dict[str, Any]:
    """Load and run a packed folder's workload: private pages, their peak, and times."""
    memory.return_freed_memory()
    import torch

    from haversack.jobs.run import loop_name, open_decoder

    _import_runtime()
    imported_private, imported_file = memory.private_bytes(), memory.file_bytes()
    marks: dict[str, int] = {}
    with memory.PeakSampler() as sampler:
        started = time.perf_counter()
        model = _load(folder)
        decoder, refusal = open_decoder(model)
        load_seconds = time.perf_counter() - started
        load_private = memory.private_bytes()
        workload = model.haversack.plan["workload"]
        prompt = _prompt(folder, model, workload)
        started_ns = time.time_ns()
        number, _ = _generate(model, decoder, prompt, max(1, workload["generate_tokens"]), marks)
        ended_ns = time.time_ns()
    decode_seconds = (ended_ns - marks["decode"]) / 1e9
    steps = max(0, number - 1)
    window = getattr(model, "haversack_window", None)
    return {
        "imported_private_bytes": imported_private,
        "imported_file_bytes": imported_file,
        "loaded_private_bytes": load_private,
        "peak_private_bytes": sampler.peak_bytes,
        "file_bytes": memory.file_bytes(),
        "load_seconds": load_seconds,
        "prefill_seconds": (marks["decode"] - started_ns) / 1e9,
        "decode_tokens_per_second": workload["users"] * steps / decode_seconds,
        "seconds_per_step": decode_seconds / steps if steps else 0.0,
        "threads": torch.get_num_threads(),
        "kernels": _kernels(model.haversack),
        "loop": loop_name(decoder),
        "loop_reason": refusal,
        "stall_seconds": window.statistics.stall_seconds if window is not None else None,
        "disk_read_bytes_per_second": window.statistics.bytes_per_second if window is not None else None,
    }


def measure_tensors(folder: Path) -> dict[str, Any]:
    """Load and run a packed folder's workload under torch's profiler: allocated bytes by phase, residents by owner."""
    import torch

    from haversack.jobs.run import open_decoder

    _import_runtime()
    marks = {"load": time.time_ns()}
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model = _load(folder)
        decoder, _ = open_decoder(model)
        workload = model.haversack.plan["workload"]
        prompt = _prompt(folder, model, workload)
        marks["prefill"] = time.time_ns()
        _, cache = _generate(
            model, decoder, prompt, max(1, workload["generate_tokens"]), marks, stop_after=PROFILED_TOKENS
        )
    return {"residents": _residents(model, cache), "tensor_peaks": _phase_peaks(profile, marks)}


def _import_runtime() -> None:
    """What loading imports is the runtime's, so it comes before the first look."""
    import transformers.models.auto.modeling_auto  # noqa: F401

    import haversack.engine.load  # noqa: F401


def _load(folder: Path) -> Any:
    from haversack.jobs.run import load

    return load(folder)


def _prompt(folder: Path, model: Any, workload: dict[str, Any]) -> torch.Tensor:
    """`(users, prompt_tokens)` of the shipped calibration text, or seeded random ids where there is no tokenizer."""
    import torch

    from haversack import data
    from haversack.errors import PlanError
    from haversack.jobs.run import open_tokenizer

    users, num_tokens = workload["users"], workload["prompt_tokens"]
    try:
        ids = open_tokenizer(folder)(data.text("calibration")[: 16 * users * num_tokens])["input_ids"]
    except (PlanError, FileNotFoundError):
        ids = []
    if len(ids) < users * num_tokens:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(model.haversack.described.vocab_size, (users, num_tokens), generator=generator)
    return torch.tensor(ids[: users * num_tokens]).reshape(users, num_tokens)


def _generate(
    model: Any,
    decoder: Decoder | None,
    prompt: torch.Tensor,
    new_tokens: int,
    marks: dict[str, int],
    stop_after: int | None = None,
) -> tuple[int, Any]:
    """Greedy generation, by compiled steps where there is a decoder, of `new_tokens` per user, stopped `stop_after` tokens but in a cache for all of them; the number
    generated and the cache."""
    import torch
    from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
    from transformers.generation.logits_process import LogitsProcessor

    class Enough(StoppingCriteria):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
            done = stop_after is not None and input_ids.shape[1] - prompt.shape[1] >= stop_after
            return torch.full((input_ids.shape[0],), done, dtype=torch.bool)  # type: ignore[return-value]

    class Mark(LogitsProcessor):
        """Notes when the first token's logits are there: prefill is over."""

        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            marks.setdefault("decode", time.time_ns())
            return scores

    if decoder is not None:

        def mark(tokens: torch.Tensor) -> None:
            marks.setdefault("decode", time.time_ns())

        with torch.inference_mode():
            out, cache = decoder.generate(
                prompt,
                torch.ones_like(prompt),
                min(new_tokens, stop_after or new_tokens),
                capacity_tokens=prompt.shape[1] + new_tokens - 1,
                on_tokens=mark,
            )
        return out.shape[1] - prompt.shape[1], cache
    with torch.inference_mode():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([Mark()]),
            stopping_criteria=StoppingCriteriaList([Enough()]),
            pad_token_id=0,
        )
    return out.sequences.shape[1] - prompt.shape[1], out.past_key_values


def _phase_peaks(profile: Any, marks: dict[str, int]) -> dict[str, int]:
    """The most bytes allocated by torch in each phase, from the allocator's events in order."""
    phases = sorted(marks.items(), key=lambda item: item[1])
    peaks = {name: 0 for name, _ in phases}
    live = 0
    for start_ns, num_bytes in sorted(memory_events(profile)):
        live += num_bytes
        current = next((name for name, begin in reversed(phases) if start_ns >= begin), phases[0][0])
        peaks[current] = max(peaks[current], live)
    return peaks


def memory_events(profile: Any) -> Iterator[tuple[int, int]]:
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            yield event.start_ns(), event.nbytes()


def _residents(model: Any, cache: Any) -> dict[str, int]:
    """Bytes on distinct storages by owner, as they lie in memory now."""
    from haversack.engine.packed_tensor import PackedStack, PackedTensor

    plan = model.haversack
    resident: list[torch.Tensor] = []
    mapped: list[torch.Tensor] = []
    rest: list[torch.Tensor] = list(model.buffers())
    seen: set[str] = set()
    for parameter in model.parameters():
        if isinstance(parameter, PackedStack | PackedTensor):
            tensors = parameter.experts if isinstance(parameter, PackedStack) else (parameter,)
            for block in (block for tensor in tensors for block in tensor.blocks):
                mode = plan.placement(block.matrix.site_id)
                if block.matrix.site_id in seen or mode == "streamed":
                    continue
                seen.add(block.matrix.site_id)
                (mapped if mode == "mapped" else resident).extend(block.matrix.tensors().values())
        else:
            rest.append(parameter)
    window = getattr(model, "haversack_window", None)
    rows = {
        "weights": _distinct_bytes(resident),
        "weights (mapped)": sum(tensor.nbytes for tensor in mapped),
        "weights (stream window)": 0 if window is None else window.window_bytes,
        "rest": _distinct_bytes(rest),
        "kv": cache.num_bytes() if hasattr(cache, "num_bytes") else 0,
    }
    return {owner: num_bytes for owner, num_bytes in rows.items() if num_bytes}


def _distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _kernels(packed: Any) -> dict[str, list[str]]:
    """Kernel (of one token, and of a prefill chunk where that is another) -> grids that run through it."""
    from haversack.parts.weights.base import WeightOption

    found: dict[str, set[str]] = {}
    for site in packed.described.weights:
        option = WeightOption.from_dict(packed.folder.manifest.sites[site.id].option)
        names = (option.kernel_name(n, site.out_features, site.in_features, packed.described.dtype) for n in (1, 512))
        stored = option.code or option.grid
        label = "as is" if stored is None else stored.label
        found.setdefault(", ".join(dict.fromkeys(names)), set()).add(label)
    plan = packed.kv_plan
    for site, kv in zip(plan.sites, plan.options):
        name = kv.kernel_name(site, capacity_tokens=plan.capacity_tokens, dtype=plan.dtype)
        found.setdefault(f"attention {name}", set()).add(kv.label)
    return {kernel: sorted(labels) for kernel, labels in found.items()}


if __name__ == "__main__":
    instrument = {"process": measure_process, "tensors": measure_tensors}[sys.argv[1]]
    print(json.dumps(instrument(Path(sys.argv[2]))))
