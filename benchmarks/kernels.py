"""One-token packed matmul against a plain read with the same threads, and long inputs against dense bfloat16.

    python -m benchmarks.kernels [--out FILE] [--threads 1] [--rotate 2GiB] [--read 4GiB] [--repeats 7]

Contenders take turns inside every repeat, so that a busy neighbour hits them all; weights rotate over `--rotate` bytes
of copies, so that no cache holds them. Each repeat times one matmul per copy, and a contender's time is the median over
copies, then over repeats. The read is timed in pieces as large as the matrix: on a shared machine a long read is mostly
other people's turns. Bytes are those of codes, scales and zeros. Sources of the goals: the project's issue on kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from haversack.kernels import compiled, llvm, read_bandwidth
from haversack.kernels.format import PackedFormat
from haversack.kernels.registry import kernel_name, packed_matmul
from haversack.kernels.torch_packed import pack_torch_int4, pack_torch_int8
from haversack.units import parse_bytes

SHAPES = [(4096, 4096), (11008, 4096)]  # (out, in)
GOALS = {2: 0.65, 3: 0.65, 4: 0.8, 8: 0.8}
GROUP_SIZE = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels.json"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rotate", type=parse_bytes, default=parse_bytes("2GiB"))
    parser.add_argument("--read", type=parse_bytes, default=parse_bytes("4GiB"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--long", type=int, default=512, help="tokens of the long input")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = {"machine": machine(arguments.threads), "one_token": [], "long": []}
    memory = torch.ones(arguments.read, dtype=torch.uint8)
    for out_features, in_features in SHAPES:
        rows = one_token(out_features, in_features, memory, arguments.rotate, arguments.repeats)
        report["one_token"] += rows
        print_one_token(rows)
        report["long"].append(long_input(arguments.long, out_features, in_features, arguments.repeats))
        print(report["long"][-1])
        arguments.out.write_text(json.dumps(report, indent=1))


def machine(num_threads: int) -> dict[str, object]:
    target = llvm.host_target()
    return {
        "cpu": target.cpu,
        "features": [f[1:] for f in target.features.split(",") if f.startswith(("+avx", "+amx", "+neon"))],
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": num_threads,
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def one_token(
    out_features: int, in_features: int, memory: torch.Tensor, rotate_bytes: int, repeats: int
) -> list[dict[str, object]]:
    """Rows of the table for one shape: every contender's seconds, bytes, rate, and rate over the read's."""
    contenders: dict[str, tuple[int, Callable[[int], None], int]] = {}
    for bits in (2, 3, 4, 8):
        fmt = PackedFormat(bits, GROUP_SIZE, in_features, True)
        matrix_bytes = out_features * (fmt.row_bytes + 2 * fmt.num_groups)
        copies = max(1, rotate_bytes // matrix_bytes)
        size = out_features * fmt.row_bytes
        codes = memory[: copies * size].view(copies, out_features, fmt.row_bytes)
        scales = torch.full((copies, out_features, fmt.num_groups), 0.01, dtype=torch.float16)
        x = torch.randn(1, in_features, dtype=torch.bfloat16)
        for activation_bits in (16, 8):
            name = kernel_name(
                1,
                out_features,
                in_features,
                bits=bits,
                group_size=GROUP_SIZE,
                activation_bits=activation_bits,
                dtype=torch.bfloat16,
            )

            def ours(i, codes=codes, scales=scales, x=x, bits=bits, activation_bits=activation_bits):
                packed_matmul(
                    x,
                    codes[i],
                    scales[i],
                    bits=bits,
                    group_size=GROUP_SIZE,
                    in_features=in_features,
                    activation_bits=activation_bits,
                )

            contenders[f"{bits} bits, {name}"] = (matrix_bytes, ours, copies)
    contenders |= torch_contenders(out_features, in_features, memory, rotate_bytes)
    piece = out_features * in_features // 2
    pieces = memory.numel() // piece
    contenders["read"] = (
        piece,
        lambda i: read_bandwidth.read_bytes_per_second(memory[i * piece : (i + 1) * piece]) and None,
        pieces,
    )
    medians: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, (_, work, copies) in contenders.items():
            work(0)
            medians[name].append(statistics.median(timed(work, i) for i in range(copies)))
    read_rate = contenders["read"][0] / statistics.median(medians["read"])
    return [
        {
            "contender": name,
            "shape": [out_features, in_features],
            "bytes": num_bytes,
            "seconds": statistics.median(medians[name]),
            "bytes_per_second": num_bytes / statistics.median(medians[name]),
            "over_read": num_bytes / statistics.median(medians[name]) / read_rate,
            "goal": GOALS.get(int(name.split()[0])) if name[0].isdigit() else None,
            "repeats": medians[name],
        }
        for name, (num_bytes, _, _) in contenders.items()
    ]


def torch_contenders(
    out_features: int, in_features: int, memory: torch.Tensor, rotate_bytes: int
) -> dict[str, tuple[int, Callable[[int], None], int]]:
    """torch's int4, int8 and dense bfloat16, over as many copies as rotate the same bytes."""
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8)
    scales = torch.full((out_features, in_features // GROUP_SIZE), 0.01)
    x = torch.randn(1, in_features, dtype=torch.bfloat16)
    found: dict[str, tuple[int, Callable[[int], None], int]] = {}
    for packed in (pack_torch_int4(codes, scales, GROUP_SIZE), pack_torch_int8(codes, scales[:, :1])):
        copies = max(1, rotate_bytes // packed.num_bytes)
        size = packed.weight.nbytes
        weights = memory[: copies * size].view(packed.weight.dtype).view(copies, *packed.weight.shape)

        def work(i: int, packed=packed, weights=weights) -> None:
            replace(packed, weight=weights[i]).matmul(x)

        found[packed.layout] = (packed.num_bytes, work, copies)
    size = 2 * out_features * in_features
    copies = max(1, rotate_bytes // size)
    dense = memory[: copies * size].view(torch.bfloat16).view(copies, out_features, in_features)
    found["dense bfloat16"] = (size, lambda i: F.linear(x, dense[i]) is None, copies)
    return found


def long_input(num_tokens: int, out_features: int, in_features: int, repeats: int) -> dict[str, object]:
    """4 bits by tiles against a dense bfloat16 matmul, alternating; goal: 0.6 of its rate."""
    fmt = PackedFormat(4, GROUP_SIZE, in_features, True)
    codes = torch.randint(0, 256, (out_features, fmt.row_bytes), dtype=torch.uint8)
    scales = torch.full((out_features, fmt.num_groups), 0.01, dtype=torch.float16)
    x = torch.randn(num_tokens, in_features, dtype=torch.bfloat16)
    weight = torch.randn(out_features, in_features, dtype=torch.bfloat16)
    kernel = compiled.CompiledTiles(llvm.host_target())
    seconds: dict[str, list[float]] = {"tiles": [], "dense": []}
    for _ in range(repeats + 1):
        seconds["tiles"].append(timed(lambda _: kernel.matmul(x, codes, scales, None, fmt, 16), 0))
        seconds["dense"].append(timed(lambda _: x @ weight.t(), 0))
    tiles, dense = (statistics.median(seconds[k][1:]) for k in ("tiles", "dense"))
    return {
        "tokens": num_tokens,
        "shape": [out_features, in_features],
        "kernel": kernel.NAME,
        "tiles_seconds": tiles,
        "dense_bf16_seconds": dense,
        "rate_over_dense": dense / tiles,
        "best_over_best": min(seconds["dense"]) / min(seconds["tiles"]),
        "goal": 0.6,
    }


def timed(work: Callable[[int], object], i: int) -> float:
    started = time.perf_counter()
    work(i)
    return time.perf_counter() - started


def print_one_token(rows: list[dict[str, object]]) -> None:
    print(f"\n{rows[0]['shape']}  (out, in)")
    for row in rows:
        goal = f"   goal {row['goal']}" if row["goal"] else ""
        rate = row["bytes_per_second"] / 1e9
        print(f"  {row['contender']:36s} {1e6 * row['seconds']:8.0f} us {rate:7.1f} GB/s {row['over_read']:6.2f}{goal}")


if __name__ == "__main__":
    main()
