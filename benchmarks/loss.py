"""The cut loss against torch's whole logits, alternated in one run: time both ways, memory beside the weight's gradient, gradients.

`python -m benchmarks.loss [TOKENS VOCABULARY HIDDEN]`; by default the issue's case, 4,096 x 256,000 x 256, in which torch holds 12.6 GB.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.results_file import write_results
from haversack.jobs.measured_run import memory_events
from haversack.parts.loss.base import mean_loss
from haversack.parts.loss.cut import CutCrossEntropy

ROUNDS = 5
CASE = (4096, 256_000, 256)


def main(arguments: list[str]) -> None:
    tokens, vocabulary, width = (int(a) for a in arguments) if arguments else CASE
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = (torch.randn(vocabulary, width) * width**-0.5).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,))
    losses: dict[str, Callable[[], torch.Tensor]] = {
        "cut": lambda: mean_loss(CutCrossEntropy().token_losses(hidden, weight, labels), labels),
        "torch": lambda: F.cross_entropy(F.linear(hidden, weight), labels),
    }
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    gradients: dict[str, list[torch.Tensor]] = {}
    for _ in range(ROUNDS):
        for name, loss in losses.items():
            hidden.grad = weight.grad = None
            started = time.perf_counter()
            loss().backward()
            seconds[name].append(time.perf_counter() - started)
            gradients[name] = [g.clone() for g in (hidden.grad, weight.grad) if g is not None]
    differences = [
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(gradients["cut"], gradients["torch"], strict=True)
    ]
    hidden.grad = weight.grad = None
    gradients.clear()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        losses["cut"]().backward()
    live = peak = 0
    for _, num_bytes in sorted(memory_events(profile)):
        live += num_bytes
        peak = max(peak, live)
    extra = peak - weight.nbytes
    figures = {
        "case": {"tokens": tokens, "vocab_size": vocabulary, "hidden_size": width},
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "ratio_of_fastest": min(seconds["cut"]) / min(seconds["torch"]),
        "ratios": [a / b for a, b in zip(seconds["cut"], seconds["torch"], strict=True)],
        "extra_bytes_without_weight_gradient": extra,
        "share_of_logits": extra / (4 * tokens * vocabulary),
        "largest_gradient_difference": dict(zip(("hidden", "weight"), differences, strict=True)),
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    write_results("loss", figures, ("float32; extra bytes hold the gradient of the hidden states",))


if __name__ == "__main__":
    main(sys.argv[1:])
