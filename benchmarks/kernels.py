"""Packed matmul against a plain read with the same threads, for one token and for batches, and long inputs against bf16.

    python -m benchmarks.kernels [--threads 1] [--rotate 2GiB] [--read 4GiB] [--repeats 7]

Contenders take turns inside every repeat, so that a busy neighbour hits them all; weights rotate over `--rotate` bytes
of copies, so that no cache holds them. Each repeat times one matmul per copy, and a contender's time is the median over
copies, then over repeats. The read is timed in pieces as large as the 4-bit matrix: on a shared machine a long read is
mostly other people's turns. Bytes are those of codes, scales and zeros; times include the operator's Python. Batches are
timed at 4 bits in the same way, fewer copies of each. Bit planes of 1 to 4 bits take turns as one token's contenders do, with
each one's time over that of 1 bit. Goals are the project's own. Writes `results/kernels.json`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.results_file import write_results
from haversack.kernels import llvm, read_bandwidth
from haversack.kernels.format import PackedFormat, PlaneFormat
from haversack.kernels.registry import choose_kernel, kernel_name, packed_matmul
from haversack.kernels.torch_packed import pack_torch_int4, pack_torch_int8
from haversack.units import parse_bytes

SHAPES = [(4096, 4096), (11008, 4096)]  # (out, in)
GOALS = {2: 0.65, 3: 0.65, 4: 0.8, 8: 0.8}
LONG_GOALS = {16: 0.6, 8: 1.6}
"""Of dense bfloat16's rate for long inputs, by bits of activations."""

LONG_SHAPE = (2048, 8192)
"""For long inputs, beside the others."""

GROUP_SIZE = 128
BATCHES = (2, 4, 8, 16, 32)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 4-bit float of the OCP Microscaling specification, by code."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rotate", type=parse_bytes, default=parse_bytes("2GiB"))
    parser.add_argument("--read", type=parse_bytes, default=parse_bytes("4GiB"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--long", type=int, default=512, help="tokens of the long input")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    target = llvm.host_target()
    rows: list[dict[str, object]] = []
    memory = torch.ones(arguments.read, dtype=torch.uint8)
    for shape in SHAPES:
        rows += measure(1, shape, one_token(*shape, memory, arguments.rotate), arguments.repeats)
    for shape in (*SHAPES, LONG_SHAPE):
        rows += long_input(arguments.long, *shape, arguments.repeats)
    rows += over_one_bit(measure(1, SHAPES[0], bit_planes(*SHAPES[0], memory, arguments.rotate), arguments.repeats))
    for num_tokens in BATCHES:
        rows += measure(num_tokens, SHAPES[0], batch(num_tokens, *SHAPES[0], memory), arguments.repeats)
    notes = (
        f"{arguments.threads} threads, kernels for {target.cpu}, load {os.getloadavg()[0]:.1f} at the end",
        f"the read goes over {arguments.read / 2**30:g} GiB, one token's weights over {arguments.rotate / 2**30:g} GiB",
    )
    print(write_results("kernels", rows, notes))


Contender = tuple[int, Callable[[int], None], int, float | None]
"""Bytes that one call reads, the call on a numbered copy, copies, and the goal over the read's rate, if it has one."""


def ours(
    fmt: PackedFormat, num_tokens: int, out_features: int, memory: torch.Tensor, rotate_bytes: int, activation_bits: int
) -> tuple[str, Contender]:
    """One case of `packed_matmul`, and the name of the kernel that it takes."""
    matrix_bytes = out_features * (fmt.row_bytes + fmt.scale_row_bytes)
    copies = max(1, rotate_bytes // matrix_bytes)
    codes = memory[: copies * out_features * fmt.row_bytes].view(copies, out_features, fmt.row_bytes)
    scales = torch.full((copies, out_features, fmt.num_groups), 0.01, dtype=torch.float16)
    scales = scales if fmt.scales == "f16" else torch.full(scales.shape, 120, dtype=torch.uint8)
    x = torch.randn(num_tokens, fmt.in_features, dtype=torch.bfloat16)
    case = {"bits": fmt.bits, "group_size": fmt.group_size, "activation_bits": activation_bits, "table": fmt.table}
    shape = (num_tokens, out_features, fmt.in_features)
    name = kernel_name(*shape, **case, scales=fmt.scales, dtype=torch.bfloat16)

    def work(i: int) -> None:
        packed_matmul(x, codes[i], scales[i], in_features=fmt.in_features, **case)

    return name, (matrix_bytes, work, copies, GOALS[fmt.bits] if num_tokens == 1 else None)


def one_token(out_features: int, in_features: int, memory: torch.Tensor, rotate_bytes: int) -> dict[str, Contender]:
    """Every width by every kind of activations, two codebooks, torch's packed matmuls, dense bfloat16, and the read."""
    contenders = {}
    for bits in (2, 3, 4, 8):
        for activation_bits in (16, 8):
            fmt = PackedFormat(bits, GROUP_SIZE, in_features, True)
            name, contender = ours(fmt, 1, out_features, memory, rotate_bytes, activation_bits)
            contenders[f"{bits} bits, {name}"] = contender
    for label, fmt in {
        "nf4, 64": PackedFormat(4, 64, in_features, True, tuple(codebook_values().tolist())),
        "mxfp4, 32": PackedFormat(4, 32, in_features, True, E2M1, "e8m0"),
    }.items():
        name, contender = ours(fmt, 1, out_features, memory, rotate_bytes, 16)
        contenders[f"{label}, {name}"] = contender
    contenders |= torch_contenders(1, out_features, in_features, memory, rotate_bytes)
    return contenders | read_contender(out_features, in_features, memory)


def bit_planes(out_features: int, in_features: int, memory: torch.Tensor, rotate_bytes: int) -> dict[str, Contender]:
    """Planes of signs, 1 to 4 of them, by either kind of activations; and the read."""
    contenders: dict[str, Contender] = {}
    x = torch.randn(1, in_features)
    for activation_bits in (16, 8):
        for bits in (1, 2, 3, 4):
            fmt = PlaneFormat(bits, GROUP_SIZE, in_features)
            blocks = out_features // 16
            matrix_bytes = blocks * (fmt.block_bytes + fmt.scale_block_bytes)
            copies = max(1, rotate_bytes // matrix_bytes)
            codes = memory[: copies * blocks * fmt.block_bytes].view(copies, blocks, fmt.block_bytes)
            scales = torch.full((blocks, fmt.num_groups, 1, 16), 0.01, dtype=torch.float16)
            kernel = choose_kernel(fmt, 1, x.dtype, activation_bits)

            def work(i: int, kernel=kernel, codes=codes, scales=scales, fmt=fmt, bits=activation_bits) -> None:
                kernel.matmul(x, codes[i], scales, out_features, fmt, bits)

            contenders[f"{bits} bits, {kernel.NAME}"] = (matrix_bytes, work, copies, None)
    return contenders | read_contender(out_features, in_features, memory)


def over_one_bit(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """The rows of `bit_planes`, each with its time over that of 1 bit by the same kernel."""
    times = {str(row["contender"]): float(str(row["microseconds"])) for row in rows}
    for row in rows:
        bits, _, kernel = str(row["contender"]).partition(" bits, ")
        if kernel:
            row["time_over_1_bit"] = times[f"{bits} bits, {kernel}"] / times[f"1 bits, {kernel}"]
            print(f"  {row['contender']:36s} {row['time_over_1_bit']:.2f} times 1 bit", flush=True)
    return rows


def batch(num_tokens: int, out_features: int, in_features: int, memory: torch.Tensor) -> dict[str, Contender]:
    """4 bits for several tokens, beside torch's and the read."""
    fmt = PackedFormat(4, GROUP_SIZE, in_features, True)
    rotate_bytes = 256 << 20
    contenders = {}
    for activation_bits in (16, 8):
        name, contender = ours(fmt, num_tokens, out_features, memory, rotate_bytes, activation_bits)
        contenders[f"4 bits, {name}"] = contender
    contenders |= torch_contenders(num_tokens, out_features, in_features, memory, rotate_bytes)
    return contenders | read_contender(out_features, in_features, memory[: 1 << 30])


def codebook_values() -> torch.Tensor:
    """Sixteen values that bfloat16 doesn't hold exactly, as a codebook fitted to a distribution has."""
    return torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.03, 0.97, 16))


def read_contender(out_features: int, in_features: int, memory: torch.Tensor) -> dict[str, Contender]:
    piece = out_features * in_features // 2

    def read(i: int) -> None:
        read_bandwidth.read_bytes_per_second(memory[i * piece : (i + 1) * piece])

    return {"read": (piece, read, memory.numel() // piece, None)}


def measure(
    num_tokens: int, shape: tuple[int, int], contenders: dict[str, Contender], repeats: int
) -> list[dict[str, object]]:
    """Rows of a table: every contender's time, bytes read, rate, and rate over the read's."""
    medians: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, (_, work, copies, _) in contenders.items():
            work(0)
            medians[name].append(statistics.median(timed(work, i) for i in range(copies)))
    rates = {name: contenders[name][0] / statistics.median(times) for name, times in medians.items()}
    rows: list[dict[str, object]] = []
    print(f"\n{num_tokens} tokens, {shape[0]} x {shape[1]}")
    for name, (num_bytes, _, _, goal) in contenders.items():
        microseconds = round(1e6 * statistics.median(medians[name]), 1)
        row = {"tokens": num_tokens, "out_features": shape[0], "in_features": shape[1], "contender": name}
        row |= {"read_bytes": num_bytes, "microseconds": microseconds, "over_read": rates[name] / rates["read"]}
        row |= {"goal_over_read": goal} if goal else {}
        rows.append({**row, "repeats": [round(1e6 * t, 1) for t in medians[name]]})
        said = f"   goal {goal}" if goal else ""
        over = f"{rates[name] / 1e9:7.1f} GB/s {row['over_read']:6.2f}{said}"
        print(f"  {name:36s} {microseconds:8.0f} us {over}", flush=True)
    return rows


def torch_contenders(
    num_tokens: int, out_features: int, in_features: int, memory: torch.Tensor, rotate_bytes: int
) -> dict[str, Contender]:
    """torch's int4, int8 and dense bfloat16, over as many copies as rotate the same bytes."""
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8)
    scales = torch.full((out_features, in_features // GROUP_SIZE), 0.01)
    x = torch.randn(num_tokens, in_features, dtype=torch.bfloat16)
    found: dict[str, Contender] = {}
    for packed in (pack_torch_int4(codes, scales, GROUP_SIZE), pack_torch_int8(codes, scales[:, :1])):
        copies = max(1, rotate_bytes // packed.num_bytes)
        size = packed.weight.nbytes
        weights = memory[: copies * size].view(packed.weight.dtype).view(copies, *packed.weight.shape)

        def work(i: int, packed=packed, weights=weights) -> None:
            replace(packed, weight=weights[i]).matmul(x)

        found[packed.layout] = (packed.num_bytes, work, copies, None)
    size = 2 * out_features * in_features
    copies = max(1, rotate_bytes // size)
    dense = memory[: copies * size].view(torch.bfloat16).view(copies, out_features, in_features)
    found["dense bfloat16"] = (size, lambda i: F.linear(x, dense[i]) is None, copies, None)
    return found


def long_input(num_tokens: int, out_features: int, in_features: int, repeats: int) -> list[dict[str, object]]:
    """4 bits by either kind of activations against a dense bfloat16 matmul, alternating, with goals over its rate."""
    fmt = PackedFormat(4, GROUP_SIZE, in_features, True)
    codes = torch.randint(0, 256, (out_features, fmt.row_bytes), dtype=torch.uint8)
    scales = torch.full((out_features, fmt.num_groups), 0.01, dtype=torch.float16)
    x = torch.randn(num_tokens, in_features, dtype=torch.bfloat16)
    weight = torch.randn(out_features, in_features, dtype=torch.bfloat16)
    kernels = {bits: choose_kernel(fmt, num_tokens, x.dtype, bits) for bits in LONG_GOALS}
    dense: list[float] = []
    seconds: dict[int, list[float]] = {bits: [] for bits in kernels}
    for _ in range(repeats + 1):
        dense.append(timed(lambda _: x @ weight.t(), 0))
        for bits, kernel in kernels.items():
            given = (x, codes, scales, None, fmt, bits)
            seconds[bits].append(timed(lambda _, kernel=kernel, given=given: kernel.matmul(*given), 0))
    rows: list[dict[str, object]] = []
    for bits, kernel in kernels.items():
        row: dict[str, object] = {"tokens": num_tokens, "out_features": out_features, "in_features": in_features}
        row |= {
            "contender": f"4 bits, {kernel.NAME}",
            "microseconds": round(1e6 * statistics.median(seconds[bits][1:]), 1),
        }
        row |= {"dense_bf16_microseconds": round(1e6 * statistics.median(dense[1:]), 1)}
        over = statistics.median(each / ours for each, ours in zip(dense[1:], seconds[bits][1:], strict=True))
        rows.append({**row, "rate_over_dense": over, "goal_over_dense": LONG_GOALS[bits]})
        print(rows[-1], flush=True)
    return rows


def timed(work: Callable[[int], object], i: int) -> float:
    started = time.perf_counter()
    work(i)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
