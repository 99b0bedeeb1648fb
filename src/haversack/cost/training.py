"""Tuning and training as time points and owners: what a step holds at its highest moments, loading and saving too.

Time points on the device tier: *load* (weights as they come, before they are packed), *resume* (a checkpoint read back, one tensor held
twice), *reference* (the model's own answers before it is tuned, where a loss compares with them), *forward*, *loss*, *backward*, *update*,
*evaluate* (a batch without what a backward pass needs), *save*. Each shows its highest moment. From the second step on every step is alike,
so optimizer states are there
throughout; the first step, without them, is lower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from haversack.describe.checkpoint import holds_weights
from haversack.describe.model import Model
from haversack.describe.workload import TrainingWorkload, TuneWorkload
from haversack.engine.adapters import (
    BASE_GRID,
    PACK_BYTES_PER_ELEMENT,
    PACK_ELEMENTS,
    decompose_bytes,
    reads_one_by_one,
)
from haversack.engine.rounded_weights import ROUND_BYTES_PER_ELEMENT, ROUND_ELEMENTS, codes_of
from haversack.engine.training_trace import (
    ACTIVATIONS,
    BACKWARD,
    EMBED,
    EMBED_BACKWARD,
    GRADIENTS,
    LOSS,
    LOSS_BACKWARD,
    Moment,
    TrainingTrace,
    compose,
    compose_evaluation,
    trace_training,
)
from haversack.ledger import DTYPE_BYTES, Ledger, total_bytes
from haversack.recipes.base import optimizer_option, preference

STATES, BATCH, SLACK, RUNTIME = "optimizer states", "batch", "allocator slack", "runtime"
POINTS = ("load", "resume", "reference", "forward", "loss", "backward", "update", "evaluate", "save")
PASSES = ("forward", "loss", "backward")
"""While activations are kept."""

SLACK_FRACTION = 0.02
"""Share of the tensors' peak that the process holds beside them, with the allocator's two thresholds at 256 KiB as our runs set
them (`jobs/memory.py`). With glibc's own thresholds it is 14 to 34%."""

DEFAULT_TRAINING_RUNTIME_BYTES = 320 * 2**20
"""Private bytes of a process about to train (torch 2.13 for CPUs, transformers 5.23), where this machine's own were not measured
(`describe/runtime.py`): between 281 and 341 MiB were, with what else the process had read."""


@dataclass(frozen=True)
class TrainingCost:
    """What a workload takes: the trace behind it, bytes by owner that stay, and the moments of a step."""

    workload: TrainingWorkload
    trace: TrainingTrace = field(repr=False)
    staying: Mapping[str, int]
    moments: tuple[Moment, ...] = field(repr=False)
    load_bytes: int

    @property
    def state_bytes(self) -> int:
        return self.staying.get(STATES, 0)

    @property
    def tensor_peak_bytes(self) -> int:
        """The most bytes of tensors at any time."""
        return self.ledger().peak()[1]

    def ledger(self, *, runtime_bytes: int = 0, slack_fraction: float = 0.0) -> Ledger:
        """Bytes by time point and owner. With a runtime, allocator slack is booked as a line of its own."""
        ledger = Ledger()
        for point, owners in self._points().items():
            if runtime_bytes:
                ledger.add(point, RUNTIME, "device", runtime_bytes)
            for owner, num_bytes in owners.items():
                if num_bytes:
                    ledger.add(point, owner, "device", num_bytes)
            if slack_fraction:
                ledger.add(point, SLACK, "device", int(slack_fraction * sum(owners.values())))
            if point in PASSES and self.trace.disk_bytes:
                ledger.add(point, ACTIVATIONS, "disk", self.trace.disk_bytes)
        return ledger

    @property
    def uses_reference(self) -> bool:
        """Whether the model runs over all pairs before it is tuned."""
        loss = preference(self.workload.objective) if isinstance(self.workload, TuneWorkload) else None
        return loss is not None and loss.uses_reference

    def _points(self) -> dict[str, dict[str, int]]:
        return {
            point: max(rows.values(), key=lambda row: sum(row.values())) for point, rows in self.moment_rows().items()
        }

    def moment_rows(self) -> dict[str, dict[str, dict[str, int]]]:
        """Bytes by owner at every moment of every time point: `rows[point][moment]`."""
        stays = dict(self.staying)
        rows: dict[str, dict[str, dict[str, int]]] = {"load": {"load": {"weights (as they come)": self.load_bytes}}}
        for moment in self.moments:
            owners = {("other" if owner in (EMBED, "update") else owner): n for owner, n in moment.owners.items()}
            rows.setdefault(_point_of(moment), {})[moment.name] = {**stays, **owners}
        gradients = {GRADIENTS: self.trace.gradient_bytes}
        rows["update"] = {"update": stays}  # all there is of it where weights are updated during the backward pass
        if self.workload.update == "step":
            rows["update"] = {"update": {**stays, **gradients, "workspace": self.trace.update_bytes}}
        rows["evaluate"] = {
            moment.name: {**stays, **{("other" if owner == EMBED else owner): n for owner, n in moment.owners.items()}}
            for moment in compose_evaluation(self.trace)
        }
        if self.uses_reference:  # a pass like an evaluation's, before there are states
            rows["reference"] = {
                name: {owner: n for owner, n in row.items() if owner != STATES}
                for name, row in rows["evaluate"].items()
            }
        widest = max((DTYPE_BYTES[t.dtype] * prod(t.shape) for t in self.trace.trained), default=0)
        read = {
            owner: n for owner, n in stays.items() if owner not in (STATES, BATCH)
        }  # states are kept as they are read
        rows["resume"] = {"weights": {**read, "workspace": widest}, "states": {**read, STATES: stays[STATES]}}
        rows["save"] = {"save": {**stays, "workspace": widest}}
        return {point: rows[point] for point in POINTS if point in rows}


def training_cost(
    model: Model, workload: TrainingWorkload, base_bytes: Mapping[str, int] | None = None
) -> TrainingCost:
    """Trace a workload and declare what stays. About half a second of CPU time for layers of any width; a workload that was traced for
    this model before is not traced again.

    `base_bytes` are, by owner, what a base holds that is packed already, instead of what packing it would give.
    """
    trace = _traced(model, workload)
    staying = {**trace.resident_bytes, **(base_bytes or {})}
    widened = workload.updates_in_32_bits
    option = optimizer_option(workload.optimizer)
    staying[STATES] = option.shared_bytes + sum(
        option.stored_bytes(tensor.shape, "F32" if widened else tensor.dtype, inner=tensor.is_matrix)
        for tensor in trace.trained
    )
    staying[BATCH] = 8 * workload.step_tokens
    rank = workload.lora_rank if isinstance(workload, TuneWorkload) and workload.method == "lq-lora" else 0
    load_bytes = _load_bytes(
        model, trace, workload.weights_dtype, decomposed_rank=rank, rounded=workload.precision == "int8"
    )
    if base_bytes is not None:
        load_bytes = sum(base_bytes.values()) + trace.resident_bytes.get("adapters", 0)
    return TrainingCost(workload, trace, staying, tuple(compose(trace)), load_bytes)


def _traced(model: Model, workload: TrainingWorkload) -> TrainingTrace:
    """The trace of a workload, kept with the model: a refusal and a fit weigh the same workloads in many ways."""
    traces: dict[TrainingWorkload, TrainingTrace] = model.__dict__.setdefault("_training_traces", {})
    if workload not in traces:
        traces[workload] = trace_training(model, workload)
    return traces[workload]


def _load_bytes(
    model: Model, trace: TrainingTrace, dtype: str, *, decomposed_rank: int = 0, rounded: bool = False
) -> int:
    """The most while weights come. What is not packed is there first (made from a config alone, a tied head has a matrix of its own until it is tied);
    matrices that will be packed come one by one beside it, or, where they can't be read so, all at once."""
    resident = trace.resident_bytes
    width = DTYPE_BYTES[dtype]
    whole = {shape: width * prod(shape) for shape in trace.packed}
    one_by_one = reads_one_by_one(model)
    live = resident["weights"] + (0 if one_by_one else sum(whole[shape] for shape in trace.packed))
    tied = sum(width * site.num_parameters for site in model.weights if site.role == "embedding" and site.tied_modules)
    peak = live + (0 if has_weights(model) else tied)
    for out_features, in_features in trace.packed:
        matrix = whole[out_features, in_features]
        if one_by_one:
            live += matrix
        packed = total_bytes(
            codes_of((out_features, in_features)) if rounded else BASE_GRID.stored(out_features, in_features)
        )
        working = PACK_BYTES_PER_ELEMENT[dtype] * min(PACK_ELEMENTS, out_features * in_features)
        if rounded:
            working = ROUND_BYTES_PER_ELEMENT * min(ROUND_ELEMENTS, out_features * in_features)
        if decomposed_rank:
            working = decompose_bytes(out_features, in_features, decomposed_rank, dtype)
        read = DTYPE_BYTES[model.dtype] * out_features * in_features if one_by_one else 0  # as it lies in the file
        peak = max(peak, live + read, live + packed + working)
        live += packed - matrix
    return max(peak, live + resident.get("adapters", 0) + resident.get("master weights", 0))


def has_weights(model: Model) -> bool:
    """Whether a folder's weights are loaded, instead of random ones made."""
    return holds_weights(model.folder)


def _point_of(moment: Moment) -> str:
    if moment.name in (LOSS, LOSS_BACKWARD):
        return "loss"
    return "backward" if moment.name.startswith(BACKWARD) or moment.name == EMBED_BACKWARD else "forward"
