"""Optimizers on B's shape: a whole training step against torch's AdamW, alternated in one run, and the loss after the same steps.

`python -m benchmarks.optimizers [STEPS [NAME...]]`, of all optimizers or those named. Every contender starts from the same weights and sees the same batches of the shipped text;
times are of whole steps, by the clock and by the processor (which others on the machine disturb less), and states are counted on the tensors that are there.
"""

from __future__ import annotations

import copy
import sys
import time
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.results_file import write_results
from haversack import data
from haversack.describe.model import describe_model
from haversack.describe.workload import TrainWorkload
from haversack.engine.optimizers import Stepper
from haversack.engine.training_step import TrainingStep
from haversack.jobs.training_run import open_model
from haversack.recipes.base import optimizer_names

BATCH, LENGTH = 8, 512
LEARNING_RATE = {"sgdm": 0.1, "sgd-sai": 0.3, "muon": 0.01, "adafactor": 0.01}
"""Of rules whose steps are not as long as AdamW's, which has 0.001."""

DEFAULT_STEPS = 60


class TorchAdamW(Stepper):
    """torch's own, one tensor at a time, in the step's place."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float):
        super().__init__([])
        self.inner = torch.optim.AdamW(parameters, lr=lr, foreach=False)

    def step(self) -> None:
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)


def main(arguments: list[str]) -> None:
    steps = int(arguments[0]) if arguments else DEFAULT_STEPS
    folder = data.reference_model("b")
    described = describe_model(dict(describe_model(folder).config))  # the shape alone: weights are random
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(data.text("calibration"))["input_ids"])
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(ids) - LENGTH, (steps, BATCH), generator=generator)
    batches = [torch.stack([ids[i : i + LENGTH] for i in row.tolist()]) for row in starts]
    torch.manual_seed(0)
    start = open_model(described, torch.float32, "sdpa")
    contenders: dict[str, TrainingStep] = {}
    for name in ("torch AdamW", *(arguments[1:] or optimizer_names())):
        workload = TrainWorkload(BATCH, LENGTH, precision="fp32", optimizer="adamw" if name == "torch AdamW" else name)
        step = TrainingStep(copy.deepcopy(start), described, workload).begin(described)
        rate = LEARNING_RATE.get(name, 1e-3)
        if name == "torch AdamW":
            step.optimizer = TorchAdamW(step.trained, rate)
        for optimizer in step.optimizer.optimizers:
            factor = rate / optimizer.option.rule.lr
            for group in optimizer.param_groups:
                group["lr"] *= factor
        contenders[name] = step
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    processor: dict[str, list[float]] = {name: [] for name in contenders}
    losses: dict[str, list[float]] = {name: [] for name in contenders}
    for number, batch in enumerate(batches):
        for name, step in contenders.items():
            started, computed = time.perf_counter(), time.process_time()
            losses[name].append(step.run([{"ids": batch}]))
            seconds[name].append(time.perf_counter() - started)
            processor[name].append(time.process_time() - computed)
        print(f"step {number + 1} of {steps}", flush=True)
    rows: dict[str, Any] = {}
    for name, step in contenders.items():
        rows[name] = {
            "state_bytes": sum(t.nbytes for t in step.optimizer.state_tensors()) if name != "torch AdamW" else None,
            "ratio_of_step_seconds": _median_ratio(seconds[name], seconds["torch AdamW"]),
            "ratio_of_processor_seconds": _median_ratio(processor[name], processor["torch AdamW"]),
            "first_step_ratio": seconds[name][0] / seconds["torch AdamW"][0],
            "loss_of_last_tenth": sum(losses[name][-max(1, steps // 10) :]) / max(1, steps // 10),
        }
        print(name, rows[name])
    write_results("optimizers", {"steps": steps, "tokens_per_step": BATCH * LENGTH, "rows": rows})


def _median_ratio(one: list[float], other: list[float]) -> float:
    """Of steps from the second on, paired."""
    ratios = sorted(a / b for a, b in zip(one[1:], other[1:], strict=True))
    return ratios[len(ratios) // 2]


if __name__ == "__main__":
    main(sys.argv[1:])
