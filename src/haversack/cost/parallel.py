"""What one rank holds of a training run: states sharded, layers staged, sequences cut, and buffers of communication."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from haversack.cost.training import PASSES, SLACK, SLACK_FRACTION, STATES, TrainingCost, training_cost
from haversack.describe.model import Model, describe_model
from haversack.describe.parallel import Parallelism, check_spread, rank_config, stage_layers
from haversack.describe.workload import TrainingWorkload, TuneWorkload
from haversack.engine.trace import WORKSPACE
from haversack.engine.training_trace import ACTIVATIONS, EMBED_BACKWARD, GRADIENTS, LOSS, LOSS_BACKWARD
from haversack.errors import UsageError
from haversack.ledger import DTYPE_BYTES, Ledger

SHARDED_FROM = {STATES: 1, "master weights": 1, GRADIENTS: 2, "weights": 3, "adapters": 3}
"""The ZeRO stage from which an owner is sharded (Rajbhandari et al. 2019, arXiv 1910.02054, section 5)."""

GATHERED_UNITS = 2
"""Layers' bytes that fully sharded ranks hold at once beside what lies outside the layers: one whole, one flat."""

COMMUNICATION = "communication buffers"


@dataclass(frozen=True)
class RankCost:
    """One rank of each pipeline stage: its ledger, and the layers it holds; `cost` is of the whole model on a rank's shapes."""

    parallel: Parallelism
    cost: TrainingCost = field(repr=False)
    stages: tuple[Ledger, ...] = field(repr=False)
    layers: tuple[int, ...]

    def worst(self) -> tuple[int, Ledger]:
        """The stage with the largest peak, and its ledger."""
        stage = max(range(len(self.stages)), key=lambda s: self.stages[s].peak()[1])
        return stage, self.stages[stage]


def sharded_bytes(num_bytes: int, owner: str, parallel: Parallelism) -> int:
    """What one rank holds of an owner."""
    if parallel.zero and parallel.zero >= SHARDED_FROM.get(owner, 4):
        return ceil(num_bytes / parallel.shards)
    return num_bytes


def rank_cost(
    model: Model,
    workload: TrainingWorkload,
    parallel: Parallelism,
    *,
    runtime_bytes: int = 0,
    base_bytes: Mapping[str, int] | None = None,
    whole_at_ends: bool = False,
    on_host: bool = False,
) -> RankCost:
    """The ledger of one rank of each pipeline stage. `workload.batch_size` is of one rank; ranks `on_host` speak through gloo.

    Tensor parallelism is traced: the rank's own heads, columns and vocabulary through the model's code. Pipeline stages
    keep the activations of the micro-batches in flight (one forward, one backward: `stages - stage` of them; Narayanan et al.
    2021, arXiv 2104.04473, section 2.2). Raises UsageError where a degree does not divide, and for what one process alone can do.
    """
    if parallel.ranks > 1:
        check_spread(workload)
    if workload.seq_len % parallel.context:
        raise UsageError(
            f"{parallel.context} context-parallel ranks don't divide sequences of {workload.seq_len} tokens; choose a divisor."
        )
    config = rank_config(model.config, parallel, model.name)
    part = describe_model(config) if config != dict(model.config) else model
    own = dataclasses.replace(workload, seq_len=max(2, workload.seq_len // parallel.context))
    cost = training_cost(part, own, base_bytes)
    stages = stage_layers(model.num_layers, parallel.pipeline)
    ledgers = tuple(
        _stage_ledger(cost, part, parallel, stage, stages, runtime_bytes, on_host) for stage in range(len(stages))
    )
    if whole_at_ends:
        ledgers = tuple(_with_whole_ends(ledger, cost, runtime_bytes) for ledger in ledgers)
    return RankCost(parallel, cost, ledgers, tuple(len(stage) for stage in stages))


def sent_bytes(model: Model, workload: TrainingWorkload, parallel: Parallelism) -> float:
    """Bytes that one rank sends in a step, at most.

    Data parallel: gradients once around and back, `2 P` elements, and with fully sharded weights `3 P` per micro-batch
    (Rajbhandari et al. 2019, arXiv 1910.02054, section 7). Tensor parallel: four all-reduces of the hidden states per layer
    (Shoeybi et al. 2019, arXiv 1909.08053, section 3), each `2 (t - 1) / t` of them; pipeline stages: hidden states on and back.
    """
    width = DTYPE_BYTES[workload.weights_dtype]
    own = model.num_parameters * width / (parallel.tensor * parallel.pipeline)
    tuned = isinstance(workload, TuneWorkload) and workload.method != "full"
    sent = 0.0
    if parallel.shards > 1:
        ring = (parallel.shards - 1) / parallel.shards
        gathered = own * (2 * workload.accumulation_steps if parallel.zero == 3 else 0)
        reduced = 0.0 if tuned else own * (workload.accumulation_steps if parallel.zero == 3 else 2)
        sent += ring * (gathered + reduced)
    hidden = 2.0 * workload.step_tokens * model.hidden_size / parallel.context
    if parallel.tensor > 1:
        sent += 4 * model.num_layers / parallel.pipeline * 2 * (parallel.tensor - 1) / parallel.tensor * hidden
    if parallel.pipeline > 1:
        sent += 2 * hidden
    return sent


def _stage_ledger(
    cost: TrainingCost,
    model: Model,
    parallel: Parallelism,
    stage: int,
    stages: list[range],
    runtime_bytes: int,
    on_host: bool,
) -> Ledger:
    """Owners scale with the weights of the stage's layers; activations with its layers and the batches in flight. Of each time
    point, the moment that is highest on the rank."""
    share, widest, outer, head = _shares(model, stages, stage)
    layers = len(stages[stage]) / model.num_layers
    in_flight = min(len(stages) - stage, max(1, cost.workload.accumulation_steps)) if len(stages) > 1 else 1
    experts = _expert_share(model, parallel)
    width = DTYPE_BYTES[cost.workload.weights_dtype]
    trained = min(1.0, cost.trace.gradient_bytes / max(1, width * model.num_parameters))
    units = _Units(width * widest * experts, width * outer, width * head, trained)
    ledger = Ledger()
    for point, moments in cost.moment_rows().items():
        highest: dict[str, int] = {}
        for moment, owners in moments.items():
            rows: dict[str, int] = {}
            for owner, num_bytes in owners.items():
                if owner in (*SHARDED_FROM, "packed weights", "weights (as they come)"):
                    kind = "weights" if owner == "weights (as they come)" else owner
                    own = num_bytes * share * experts
                    if owner == GRADIENTS and parallel.zero == 3 and not cost.trace.accumulates:
                        own = max(0.0, own - _whole_gradients(units, point, moment))  # these are counted as buffers
                    rows[owner] = sharded_bytes(round(own), kind, parallel)
                elif owner == ACTIVATIONS:
                    rows[owner] = round(num_bytes * layers * in_flight)
                elif owner != "logits and loss" or stage == len(stages) - 1:
                    rows[owner] = num_bytes
            if point == "update" and parallel.zero:
                rows["workspace"] = ceil(rows.get("workspace", 0) / parallel.shards)
            gathering = _gathering(units, parallel, point) if on_host else 0.0
            rows[COMMUNICATION] = round(_buffers(units, parallel, point, moment))
            before = {owner: n for owner, n in rows.items() if owner != WORKSPACE}  # a layer is gathered before it runs
            before[COMMUNICATION] = round(gathering)
            for held in (rows, before) if gathering else (rows,):
                if sum(held.values()) > sum(highest.values()):
                    highest = held
        host = {o: highest.pop(o) for o in (STATES, "master weights") if parallel.offload and highest.get(o)}
        _book(ledger, point, highest, host, runtime_bytes)
        if point in PASSES and cost.trace.disk_bytes:
            ledger.add(point, ACTIVATIONS, "disk", round(cost.trace.disk_bytes * layers * in_flight))
    return ledger


def _with_whole_ends(ledger: Ledger, cost: TrainingCost, runtime_bytes: int) -> Ledger:
    """Where weights are loaded, and where they are gathered for export, states dropped."""
    ends = Ledger()
    whole = sum(cost.trace.resident_bytes.get(owner, 0) for owner in ("weights", "packed weights", "adapters"))
    kept = {"weights": ledger.timeline["update"].get("weights", {}).get("device", 0), "weights (whole)": whole}
    _book(ends, "load", {"weights (as they come)": cost.load_bytes}, {}, runtime_bytes)
    ends.timeline |= {point: rows for point, rows in ledger.timeline.items() if point != "load"}
    _book(ends, "export", kept, {}, runtime_bytes)
    return ends


def _book(ledger: Ledger, point: str, rows: Mapping[str, int], host: Mapping[str, int], runtime_bytes: int) -> None:
    if runtime_bytes:
        ledger.add(point, "runtime", "device", runtime_bytes)
        ledger.add(point, SLACK, "device", int(SLACK_FRACTION * sum(rows.values())))
    for owner, num_bytes in rows.items():
        if num_bytes:
            ledger.add(point, owner, "device", num_bytes)
    for owner, num_bytes in host.items():
        ledger.add(point, owner, "host", num_bytes)


@dataclass(frozen=True)
class _Units:
    """Bytes of what is gathered and scattered together: the widest layer, all that lies outside the layers, and of this what
    has gradients before the layers do (the head, or the embedding tied to it); and the share that is trained."""

    layer: float
    outer: float
    head: float
    trained: float


def _buffers(units: _Units, parallel: Parallelism, point: str, moment: str) -> float:
    """What a rank holds beside its shards, as torch's fully sharded data parallel does (FSDP2, torch 2.13).

    What lies outside the layers stays whole from the first gathering to the end of the backward pass. A layer is gathered into a
    flat buffer and copied out. Forward, the flat buffer lives until the next layer was gathered. Backward, one layer is whole while the next is gathered,
    beside its own gradients and the scattered input of the layer before. Other stages of ZeRO: one layer's gradients.
    """
    if parallel.shards == 1 or parallel.zero not in (2, 3) or point not in ("forward", "loss", "backward", "evaluate"):
        return 0
    if parallel.zero == 2:
        return max(units.layer, units.outer) * units.trained if point in ("loss", "backward") else 0
    whole, layer = units.outer, units.layer
    if point in ("forward", "evaluate"):
        return whole + GATHERED_UNITS * layer
    if moment == LOSS:
        return whole + layer
    own = _whole_gradients(units, point, moment)
    if moment == LOSS_BACKWARD:
        return whole + layer + own
    if moment == EMBED_BACKWARD:
        return whole + own + layer * units.trained
    return whole + own + layer * units.trained + GATHERED_UNITS * layer


def _whole_gradients(units: _Units, point: str, moment: str) -> float:
    """Gradients that are not scattered yet: those of what lies outside the layers until all layers are done, and a layer's own while it runs."""
    if moment == EMBED_BACKWARD:
        return units.outer * units.trained
    if point == "backward":
        return (units.head + units.layer) * units.trained
    return units.head * units.trained if moment == LOSS_BACKWARD else 0.0


def _gathering(units: _Units, parallel: Parallelism, point: str) -> float:
    """What a rank holds while it gathers a layer through gloo, which gathers into a flat tensor of its own (torch 2.13,
    `ProcessGroupGloo.cpp`): beside it the layer's buffer, and the buffer of the layer before (forward) or the layer that will run next, whole,
    with the scattered input of the one before (backward)."""
    if parallel.shards == 1 or parallel.zero != 3 or point not in ("forward", "backward", "evaluate"):
        return 0.0
    held = units.outer + (GATHERED_UNITS + 1) * units.layer
    return held if point != "backward" else held + (units.head + units.layer) * units.trained


def _shares(model: Model, stages: list[range], stage: int) -> tuple[float, int, int, int]:
    """The share of all weights that lie on a stage, the weights of its widest layer, those outside its layers, and of these the
    head's."""
    by_layer = dict.fromkeys(range(model.num_layers), 0)
    first = last = 0
    for site in model.weights:
        if site.layer is not None:
            by_layer[site.layer] += site.num_parameters
        elif site.role == "head":
            last += site.num_parameters
        else:
            first += site.num_parameters
    tied = model.tie_word_embeddings
    if tied and len(stages) > 1:
        last = first  # the last stage holds a copy
    outer = (first if stage == 0 else 0) + (last if stage == len(stages) - 1 else 0)
    head = (first if tied else last) if stage == len(stages) - 1 else 0
    inside = sum(by_layer[layer] for layer in stages[stage])
    counted = sum(site.num_parameters for site in model.weights)
    return (inside + outer) / max(1, counted), max(by_layer[layer] for layer in stages[stage]), outer, head


def _expert_share(model: Model, parallel: Parallelism) -> float:
    """The share of weights left on a rank that holds `1 / expert` of the experts."""
    if parallel.expert == 1:
        return 1.0
    counted = sum(site.num_parameters for site in model.weights)
    experts = sum(site.num_parameters for site in model.weights if site.expert is not None)
    return 1 - experts / counted * (1 - 1 / parallel.expert)
