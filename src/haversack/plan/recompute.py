"""Which layers recompute so that a step's peak stays under a cap, with the least work done twice: solved exactly.

Two traces, of a step that keeps everything and of one that recomputes every layer, give each moment's bytes as a sum over layers of what
each choice holds then. So the question is a small integer program over the peak itself, not over a share of the saved bytes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from haversack.cost.training import TrainingCost, training_cost
from haversack.cost.training_seconds import layer_work
from haversack.describe.model import Model
from haversack.describe.workload import TrainWorkload, TuneWorkload, name_layers
from haversack.engine.training_trace import TrainingTrace, compose

_TRIES = 4
"""Solutions checked by a trace of their own; one that is over the cap tightens it by as much."""


def choose_recomputation(
    model: Model, workload: TuneWorkload | TrainWorkload, most_bytes: int
) -> tuple[TuneWorkload | TrainWorkload, TrainingCost] | None:
    """The workload with the layers that recompute, and its cost: least extra products under `most_bytes` of tensors, and of
    those choices the one with the lowest peak. None where even recomputing everything is too much."""
    kept, again = (training_cost(model, dataclasses.replace(workload, recompute=how)) for how in ("none", "full"))
    work = layer_work(model)
    cap = most_bytes
    for _ in range(_TRIES):
        layers = solve_layers(kept, again, work, cap)
        if layers is None:
            break
        chosen = dataclasses.replace(workload, recompute=name_layers(layers, model.num_layers))
        cost = kept if not layers else again if len(layers) == model.num_layers else training_cost(model, chosen)
        over = cost.tensor_peak_bytes - most_bytes
        if over <= 0:
            return chosen, cost
        cap -= over
    if again.tensor_peak_bytes <= most_bytes:
        return dataclasses.replace(workload, recompute="full"), again
    return None


def solve_layers(
    kept: TrainingCost, again: TrainingCost, work: tuple[float, ...], most_bytes: int
) -> frozenset[int] | None:
    """The layers that recompute, by two integer programs: least work under the cap, then lowest peak at that work."""
    num_layers = kept.trace.num_layers
    base = moment_bytes(kept.trace, again.trace, frozenset())
    rows = np.array([moment_bytes(kept.trace, again.trace, frozenset({i})) - base for i in range(num_layers)]).T
    stays = sum(kept.staying.values())
    ledger = kept.ledger()
    others = [
        point for point in ledger.timeline if point not in ("forward", "loss", "backward")
    ]  # the same whatever recomputes
    if max(ledger.total_bytes(point) for point in others) > most_bytes:
        return None
    binary = np.ones(num_layers)
    least = milp(
        np.array(work),
        constraints=LinearConstraint(rows, ub=most_bytes - stays - base),
        integrality=binary,
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if least.x is None:
        return None
    lowest = milp(
        np.append(np.zeros(num_layers), 1.0),
        constraints=[
            LinearConstraint(np.hstack([rows / 2**20, -np.ones((len(base), 1))]), ub=-base / 2**20),
            LinearConstraint(np.append(work, 0.0)[None], ub=least.fun + 1e-9),
        ],
        integrality=np.append(binary, 0),
        bounds=Bounds(np.zeros(num_layers + 1), np.append(binary, np.inf)),
        options={"mip_rel_gap": 0.0},
    )
    chosen = least.x if lowest.x is None else lowest.x[:num_layers]
    return frozenset(int(i) for i in np.flatnonzero(np.asarray(chosen) > 0.5))


def moment_bytes(kept: TrainingTrace, again: TrainingTrace, layers: frozenset[int]) -> np.ndarray:
    """Bytes of each moment of a micro-step beside what stays, with `layers` recomputed."""
    return np.array([moment.num_bytes for moment in compose(kept, again, layers)], dtype=float)
