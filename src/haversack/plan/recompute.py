"""Which layers recompute, and which operators within them, so that a step's peak stays under a cap with the least work done twice: solved exactly.

Traces of a step that keeps everything and of steps whose layers all recompute, in each way there is, give each moment's bytes as a sum over layers of what
each choice holds then. So the question is a small integer program over the peak itself, not over a share of the saved bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from haversack.cost.training import TrainingCost, training_cost
from haversack.cost.training_seconds import recomputed_flops
from haversack.describe.model import Model
from haversack.describe.workload import KEPT_OF_RECOMPUTED, TrainWorkload, TuneWorkload, name_recomputation
from haversack.engine.training_trace import TrainingTrace, compose

FLOPS_PER_BYTE = 10.0
"""What a machine multiplies while it moves a byte: weighs what lies between products, which moves what was dropped twice, against products. Of this project's
machine (`cost/training_seconds.py`); GPUs multiply more."""

_TRIES = 4
"""Solutions checked by a trace of their own; one that is over the cap tightens it by as much."""


def choose_recomputation(
    model: Model, workload: TuneWorkload | TrainWorkload, most_bytes: int
) -> tuple[TuneWorkload | TrainWorkload, TrainingCost] | None:
    """The workload with the layers that recompute, and its cost: least extra work under `most_bytes` of tensors, and of
    those choices the one with the lowest peak. None where even recomputing everything is too much."""

    def cost_of(recompute: str) -> TrainingCost:
        return training_cost(model, dataclasses.replace(workload, recompute=recompute))

    kept, again = cost_of("none"), cost_of("full")
    if kept.tensor_peak_bytes <= most_bytes:
        return dataclasses.replace(workload, recompute="none"), kept
    ways = {"": again, **{what: cost_of(f"full+{what}") for what in KEPT_OF_RECOMPUTED}}
    work = {what: extra_work(model, workload, kept.trace, cost.trace, what) for what, cost in ways.items()}
    traces = {what: cost.trace for what, cost in ways.items()}
    cap = most_bytes
    for _ in range(_TRIES):
        layers = solve_layers(kept, traces, work, cap)
        if layers is None:
            break
        chosen = dataclasses.replace(workload, recompute=name_recomputation(layers, model.num_layers))
        cost = again if chosen.recompute == "full" else training_cost(model, chosen)
        over = cost.tensor_peak_bytes - most_bytes
        if over <= 0:
            return chosen, cost
        cap -= over
    if again.tensor_peak_bytes <= most_bytes:
        return dataclasses.replace(workload, recompute="full"), again
    return None


def extra_work(
    model: Model, workload: TuneWorkload | TrainWorkload, kept: TrainingTrace, again: TrainingTrace, what: str
) -> tuple[float, ...]:
    """What each layer's second run costs where it keeps `what` of the first: its products, and the bytes between them."""
    flops = recomputed_flops(model, workload, what)
    dropped = [max(0, kept.kept_bytes(i) - again.kept_bytes(i)) for i in range(model.num_layers)]
    return tuple(own + 2 * FLOPS_PER_BYTE * num_bytes for own, num_bytes in zip(flops, dropped, strict=True))


def solve_layers(
    kept: TrainingCost, ways: Mapping[str, TrainingTrace], work: Mapping[str, tuple[float, ...]], most_bytes: int
) -> dict[int, str] | None:
    """The layers that recompute and the way of each, by two integer programs: least work under the cap, then lowest peak at that work."""
    layers = range(kept.trace.num_layers)
    base = moment_bytes(kept.trace, {})
    choices = [(i, what) for what in ways for i in layers]
    rows = np.array([moment_bytes(kept.trace, {i: ways[what]}) - base for i, what in choices]).T
    ledger = kept.ledger()
    others = [
        point for point in ledger.timeline if point not in ("forward", "loss", "backward")
    ]  # the same whatever recomputes
    if max(ledger.total_bytes(point) for point in others) > most_bytes:
        return None
    scale = max(1.0, max(max(per_layer) for per_layer in work.values()))
    costs = np.array([work[what][i] / scale for i, what in choices])
    one_way = np.array([[float(i == layer) for i, _ in choices] for layer in layers])
    room = most_bytes - sum(kept.staying.values())
    integral = np.ones(len(choices))
    least = milp(
        costs,
        constraints=[LinearConstraint(rows, ub=room - base), LinearConstraint(one_way, ub=1)],
        integrality=integral,
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if least.x is None:
        return None
    peak = np.append(np.zeros(len(choices)), 1.0)
    lowest = milp(
        peak,
        constraints=[
            LinearConstraint(np.hstack([rows / 2**20, -np.ones((len(base), 1))]), ub=-base / 2**20),
            LinearConstraint(np.hstack([one_way, np.zeros((len(layers), 1))]), ub=1),
            LinearConstraint(np.append(costs, 0.0)[None], ub=least.fun + 1e-9),
        ],
        integrality=np.append(integral, 0),
        bounds=Bounds(np.zeros(len(peak)), np.append(integral, np.inf)),
        options={"mip_rel_gap": 0.0},
    )
    chosen = least.x if lowest.x is None else lowest.x[:-1]
    return dict(sorted(choices[k] for k in np.flatnonzero(np.asarray(chosen) > 0.5)))


def moment_bytes(kept: TrainingTrace, again: Mapping[int, TrainingTrace]) -> np.ndarray:
    """Bytes of each moment of a micro-step beside what stays, where layers are as `again` has them."""
    return np.array([moment.num_bytes for moment in compose(kept, again)], dtype=float)
