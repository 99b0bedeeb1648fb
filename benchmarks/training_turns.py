"""This project's own training runs, asked as peers are (`benchmarks.peers.training`).

Settings: `workload`, as a plan has it; recomputation, micro-batches and the moment of the update are the plan's own.
"""

from __future__ import annotations

from typing import Any

from exchange import serve
from training import Step, measure, train


class PlannedStep(Step):
    """A plan's step: the model and its optimizer as `haversack train` and `haversack tune` run them."""

    def __init__(self, step: Any):
        super().__init__(step.model, step.optimizer.optimizers, step.workload.batch_size)
        self.step = step

    def micro_step(self, ids: Any, share: float) -> float:
        return float(self.step.micro_step(ids, share=share))

    def update(self) -> None:
        self.step.update()


def make(request: dict[str, Any]) -> PlannedStep:
    from haversack.describe.model import describe_model
    from haversack.describe.workload import TrainWorkload, TuneWorkload, workload_from_dict
    from haversack.engine.training_step import DTYPES, TrainingStep
    from haversack.jobs.training_run import open_model

    workload = workload_from_dict(request["settings"]["workload"])
    assert isinstance(workload, TrainWorkload | TuneWorkload)
    described = describe_model(request["model"])
    if request["init"] == "random":
        described = describe_model(dict(described.config))  # the shape alone
    model = open_model(described, DTYPES[workload.weights_dtype], workload.attention, seed=request["seed"])
    step = TrainingStep(model, described, workload).begin(described)
    for optimizer in step.optimizer.optimizers:
        times = request["rate"] / optimizer.param_groups[0]["lr"]
        for group in optimizer.param_groups:
            group["lr"] *= times
    return PlannedStep(step)


if __name__ == "__main__":
    serve({"train": train(make), "measure": measure(make)}, ["torch", "transformers"])
