"""Keys and values of a 1.1B Llama shape while 8,192 tokens are prefilled at 12.5% of the 16-bit bytes: declared against the allocator's peak.

All 22 layers are built and fed the same chunks, in turns as a model does; what the allocator holds at its highest moment beyond the chunk's own queries,
keys, values and output is set against the declared slabs and the largest declared workspace. The whole cache would take 176 MiB.

    python -m benchmarks.kv_prefill [--tokens 8192] [--chunk 256] [--layers 22]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.results_file import write_results
from haversack.describe.site import AttentionSite
from haversack.engine.kv_cache import KVPlan
from haversack.errors import DoesNotFitError
from haversack.parts.kv.base import KVOption, by_head
from haversack.parts.kv.quantized import QuantizedKV
from haversack.parts.kv.sinks import SinksAndWindow
from haversack.recipes.base import all_recipes
from haversack.recipes.cache_budget import CacheBudget
from haversack.units import format_bytes

SHARE = 0.125
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 4, 64


def sites(num_layers: int) -> tuple[AttentionSite, ...]:
    return tuple(
        AttentionSite(f"layers.{i}", i, f"layers.{i}", NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM)
        for i in range(num_layers)
    )


def policies(budget: CacheBudget) -> dict[str, tuple[KVOption, ...]]:
    """Recipes that need no measurements and have a form as small; and heads that differ, as the planner gives them."""
    found = {}
    for name, recipe in all_recipes().items():
        if recipe.whole_cache is None or recipe.needs_statistics:
            continue
        try:
            found[name] = recipe.whole_cache(budget)
        except DoesNotFitError as error:
            print(f"{name}: {error}")
    packed, window = KVOption(None, QuantizedKV(2, 2, 64, 0)), KVOption(SinksAndWindow(4, 508))
    found["one head packed, three windows"] = (by_head([packed, window, window, window]),) * len(budget.sites)
    return found


def peak_bytes(plan: KVPlan, num_tokens: int, chunk: int) -> int:
    """The most that live allocations grew by, from building the layers to the last chunk, the chunks' own tensors left out."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, NUM_HEADS, chunk, HEAD_DIM), (1, NUM_KV_HEADS, chunk, HEAD_DIM), (1, NUM_KV_HEADS, chunk, HEAD_DIM))
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        layers = [
            option.build(site, batch_size=1, capacity_tokens=num_tokens, dtype="BF16")
            for site, option in zip(plan.sites, plan.options)
        ]
        for _ in range(num_tokens // chunk):
            for layer in layers:
                layer.step(*inputs, scaling=HEAD_DIM**-0.5)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - inputs[0].nbytes  # the output, as large as the queries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--layers", type=int, default=22)
    arguments = parser.parse_args()
    where = sites(arguments.layers)
    whole = arguments.tokens * sum(site.bytes_per_token("BF16") for site in where)
    budget = CacheBudget(where, arguments.tokens, "BF16", int(SHARE * whole))
    figures: list[dict[str, Any]] = []
    for name, options in policies(budget).items():
        plan = KVPlan(where, options, 1, arguments.tokens, "BF16", arguments.chunk)
        predicted = plan.max_bytes() + plan.workspace_bytes(arguments.chunk)
        measured = peak_bytes(plan, arguments.tokens, arguments.chunk)
        figures.append(
            {
                "cache": name,
                "stored_bytes": plan.max_bytes(),
                "share_of_16_bits": plan.max_bytes() / whole,
                "predicted_bytes": predicted,
                "measured_bytes": measured,
                "error": (measured - predicted) / predicted,
            }
        )
        print(
            f"{name}: {format_bytes(predicted)} predicted, {format_bytes(measured)} measured, {figures[-1]['error']:+.2%}",
            flush=True,
        )
    standard = arguments == parser.parse_args([])
    if standard:
        print(write_results("kv_prefill", figures))


if __name__ == "__main__":
    main()
