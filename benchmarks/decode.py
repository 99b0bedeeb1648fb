"""Decoding a 1.1B Llama shape packed at 4 bits: tokens/s over the bound, by batch, by cache, and the time to a first token.

    python -m benchmarks.decode [--folder build/decode-1b] [--threads 2] [--only PART ...]

The bound is the time a plain read takes, with the same threads, for all bytes that a step reads: weights, scales and the
stored cache, each once. The read is measured over 4 GiB, in turn with the steps. Weights are random (decoding reads them
all the same); one step reads more of them than any cache here holds. Every contender is a function of a workload that
returns what `Measured` says, in a process of its own: another engine is one more function in `CONTENDERS`.
Goals: the project's issue on kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results_file import write_results
from benchmarks.streaming import CONFIG, make_model

if TYPE_CHECKING:
    import torch

    from haversack.engine.kv_cache import HaversackCache, KVPlan
    from haversack.parts.weights.base import WeightOption

SHAPE = {**CONFIG, "max_position_embeddings": 16384}
READ_BYTES = 4 << 30
STEPS = 32
"""Steps of one timed run; the first is not timed."""

REPEATS = 7


@dataclass(frozen=True)
class Workload:
    """`cache` is "16" or the bits of keys and values; the prompt's `context_tokens` are in it before the first step."""

    batch_size: int
    context_tokens: int
    cache: str = "16"


@dataclass(frozen=True)
class Measured:
    """Medians over repeats; `bytes_per_step` is counted on the tensors that a step reads."""

    seconds_per_step: float
    tokens_per_second: float
    bytes_per_step: int
    fraction_of_bound: float
    read_bytes_per_second: float
    loop: str
    repeats: tuple[float, ...]


WORKLOADS = (
    Workload(1, 64),
    Workload(8, 64),
    Workload(1, 8192),
    Workload(1, 8192, "4"),
    Workload(1, 8192, "2"),
)


def four_bits(activation_bits: int = 16) -> WeightOption:
    """4 bits in groups of 128, rounded to nearest."""
    from haversack.parts.weights.base import WeightOption
    from haversack.parts.weights.integer import IntegerGrid
    from haversack.parts.weights.nearest import NearestRounding

    grid = IntegerGrid(4, 128, activation_bits=activation_bits, search=False)
    return WeightOption(grid=grid, rounding=NearestRounding())


def pack_model(folder: Path, activation_bits: int = 16) -> Path:
    """The packed folder: every matrix at 4 bits in groups of 128, rounded to nearest, the cache in 16 bits."""
    packed = folder.with_name(folder.name + ("-int4" if activation_bits == 16 else f"-int4-a{activation_bits}"))
    if (packed / "config.json").exists():
        return packed
    from haversack.cost.damage import NONE
    from haversack.describe.machine import Machine
    from haversack.describe.model import describe_model
    from haversack.describe.workload import ServeWorkload
    from haversack.jobs.pack import pack
    from haversack.parts.kv.base import KVOption
    from haversack.plan.make import make_plan
    from haversack.plan.question import Question

    model = describe_model(make_model(folder, SHAPE))
    four = four_bits(activation_bits)
    answer = make_plan(
        Question(
            model=model,
            workload=ServeWorkload(64, 64),
            machine=Machine("benchmark", 2, 2**34, 2**34),
            budget_bytes=2**34,
            budget_kind="tensor",
            weight_damages={site.id: {four: NONE} for site in model.weights},
            kv_damages={site.id: {KVOption(): NONE} for site in model.attention},
            placement="resident",
        )
    )
    pack(model, answer.plan, packed)
    return packed


def haversack_decode(folder: Path, workload: Workload, loop: str) -> Measured:
    """This project's own loops: "compiled step", or transformers' loop over the same weights and cache."""
    import torch

    from haversack.engine.decoder.loop import LOOP, Decoder
    from haversack.engine.kv_cache import HaversackCache
    from haversack.jobs.run import load
    from haversack.kernels.read_bandwidth import read_bytes_per_second

    model = load(folder)
    plan = one_cache(model, workload.batch_size, workload.context_tokens + (REPEATS + 1) * (STEPS + 2), workload.cache)
    cache = HaversackCache(plan)
    generator = torch.Generator().manual_seed(0)
    fill(cache, workload.context_tokens, generator)
    tokens = torch.randint(SHAPE["vocab_size"], (workload.batch_size,), generator=generator)

    if loop == LOOP:
        steps = Decoder(model).steps(cache, tokens)
        step = steps.next_tokens
    else:

        def step(tokens: torch.Tensor) -> torch.Tensor:
            out = model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].float().argmax(-1)

    memory = torch.ones(READ_BYTES, dtype=torch.uint8)
    seconds, rates = [], []
    with torch.inference_mode():
        for repeat in range(REPEATS):
            rates.append(read_bytes_per_second(memory))
            tokens = step(tokens)
            started = time.perf_counter()
            for _ in range(STEPS if repeat else 2):
                tokens = step(tokens)
            if repeat:
                seconds.append((time.perf_counter() - started) / STEPS)
    num_bytes = weight_bytes(model, workload.batch_size) + held_bytes(cache)
    rate, middle = statistics.median(rates), statistics.median(seconds)
    return Measured(
        middle,
        workload.batch_size / middle,
        num_bytes,
        num_bytes / rate / middle,
        rate,
        loop,
        tuple(seconds),
    )


def one_cache(model: Any, batch_size: int, capacity_tokens: int, cache: str) -> KVPlan:
    """A plan, installed, with the same cache in every layer: "16" bits, or keys and values at so many behind a recent window."""
    from haversack.engine.generation import install_kv_plan
    from haversack.engine.kv_cache import KVPlan
    from haversack.parts.kv.base import KVOption
    from haversack.parts.kv.quantized import QuantizedKV

    bits = int(cache)
    option = KVOption() if bits == 16 else KVOption(None, QuantizedKV(bits, bits, 64, 64))
    sites = model.haversack.described.attention
    plan = KVPlan(sites, (option,) * len(sites), batch_size, capacity_tokens, "BF16")
    install_kv_plan(model, plan)
    return plan


def fill(cache: HaversackCache, context_tokens: int, generator: torch.Generator) -> None:
    """Random tokens through the ordinary append, as a prefill does."""
    import torch

    for layer in cache.planned:
        site = layer.site
        for start in range(0, context_tokens, 512):
            shape = (layer.planned_batch_size, site.num_kv_heads, min(512, context_tokens - start))
            keys = torch.randn(*shape, site.key_head_dim, generator=generator).to(torch.bfloat16)
            values = torch.randn(*shape, site.value_head_dim, generator=generator).to(torch.bfloat16)
            if layer.store is None:
                layer.lazy_initialization(keys, values)
            layer.store.append(keys, values)
        layer.columns = context_tokens


def weight_bytes(model: Any, batch_size: int) -> int:
    """Bytes of all matrices that a step reads: whole ones, but of the embedding only the looked-up rows."""
    from haversack.engine.packed_tensor import PackedTensor

    embedding = model.get_input_embeddings().weight
    total = 0
    for parameter in model.parameters():
        if isinstance(parameter, PackedTensor):
            stored = sum(t.nbytes for block in parameter.blocks for t in block.matrix.tensors().values())
            total += stored * batch_size // parameter.shape[0] if parameter is embedding else stored
        else:
            total += parameter.nbytes
    return total


def held_bytes(cache: HaversackCache) -> int:
    """Bytes of a cache that hold tokens."""
    stores = [layer.store for layer in cache.planned]
    return int(sum(s.used_slots(name) / t.shape[2] * t.nbytes for s in stores for name, t in s.tensors.items()))


CONTENDERS: dict[str, Callable[[Path, Workload], Measured]] = {
    "haversack": lambda folder, workload: haversack_decode(folder, workload, "compiled step"),
    "haversack weights, transformers' loop": lambda folder, workload: haversack_decode(
        folder, workload, "transformers"
    ),
}


def first_token(folder: Path) -> dict[str, float]:
    """Seconds from a process's start to its first token, stage by stage: with no kernel cache, and then with one."""
    found = {}
    with tempfile.TemporaryDirectory() as home:
        for name in ("cold", "with the kernel cache"):
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.decode", "--first-token", str(folder)],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "XDG_CACHE_HOME": home},
                check=True,
            )
            found[name] = json.loads(done.stdout.splitlines()[-1]) | {"process": time.perf_counter() - started}
    return found


def first_token_once(folder: Path) -> dict[str, float]:
    """Seconds of each stage up to the first token after a prompt of 64, and to the second, which is the first compiled step."""
    started = time.perf_counter()
    import torch

    from haversack.engine.sequence import PlannedSequence
    from haversack.jobs.run import import_runtime, load, open_decoder

    import_runtime()
    marks = {"imports": time.perf_counter()}
    model = load(folder)
    marks["load"] = time.perf_counter()
    decoder, _ = open_decoder(model)
    marks["decoder"] = time.perf_counter()
    sequence = PlannedSequence(model, model.haversack.kv_plan, decoder=decoder)
    prompt = torch.randint(SHAPE["vocab_size"], (64,), generator=torch.Generator().manual_seed(0)).tolist()
    for name, ids in (("first token", prompt), ("second token", [5])):
        logits = sequence.read(ids)
        assert logits is not None
        logits.argmax()
        marks[name] = time.perf_counter()
    times = [started, *marks.values()]
    return {name: now - before for name, now, before in zip(marks, times[1:], times)}


def measure(names: Iterable[str], folder: Path, threads: int) -> list[dict[str, Any]]:
    """Every contender on every workload, one process each."""
    rows = []
    for workload in WORKLOADS:
        for name in names:
            given = [str(folder), name, json.dumps(asdict(workload)), str(threads)]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.decode", "--one", *given],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            rows.append({"contender": name, **asdict(workload), **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        import torch

        folder, name, workload, threads = sys.argv[2:6]
        torch.set_num_threads(int(threads))
        print(json.dumps(asdict(CONTENDERS[name](Path(folder), Workload(**json.loads(workload))))))
        return
    if sys.argv[1:2] == ["--first-token"]:
        print(json.dumps(first_token_once(Path(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/decode-1b"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--contender", action="append", choices=list(CONTENDERS))
    parser.add_argument("--pack-only", action="store_true")
    arguments = parser.parse_args()
    packed = pack_model(arguments.folder)
    if arguments.pack_only:
        return
    figures = {
        "threads": arguments.threads,
        "decode": measure(arguments.contender or CONTENDERS, packed, arguments.threads),
        "first_token": first_token(packed),
    }
    print(write_results("decode", figures))


if __name__ == "__main__":
    main()
