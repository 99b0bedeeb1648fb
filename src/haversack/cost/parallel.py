"""What one rank holds of a training run: states sharded, layers staged, sequences cut, and buffers of communication."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from haversack.cost.training import SLACK, SLACK_FRACTION, STATES, TrainingCost, training_cost
from haversack.describe.model import Model, describe_model
from haversack.describe.parallel import Parallelism, rank_config, stage_layers
from haversack.describe.workload import TrainingWorkload, TuneWorkload
from haversack.engine.training_trace import ACTIVATIONS, GRADIENTS
from haversack.errors import UsageError
from haversack.ledger import DTYPE_BYTES, Ledger

SHARDED_FROM = {STATES: 1, "master weights": 1, GRADIENTS: 2, "weights": 3}
"""The ZeRO stage from which an owner is sharded (Rajbhandari et al. 2019, arXiv 1910.02054, section 5)."""

GATHERED_UNITS = 2
"""Whole layers that fully sharded ranks hold at once: the one that computes and the one being gathered."""

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
) -> RankCost:
    """The ledger of one rank of each pipeline stage. `workload.batch_size` is of one rank.

    Tensor parallelism is traced: the rank's own heads, columns and vocabulary through the model's code. Pipeline stages
    keep the activations of the micro-batches in flight (one forward, one backward: `stages - stage` of them; Narayanan et al.
    2021, arXiv 2104.04473, section 2.2). Raises UsageError where a degree does not divide.
    """
    if workload.seq_len % parallel.context:
        raise UsageError(
            f"{parallel.context} context-parallel ranks don't divide sequences of {workload.seq_len} tokens; choose a divisor."
        )
    config = rank_config(model.config, parallel, model.name)
    part = describe_model(config) if config != dict(model.config) else model
    own = dataclasses.replace(workload, seq_len=max(2, workload.seq_len // parallel.context))
    cost = training_cost(part, own, base_bytes)
    stages = stage_layers(model.num_layers, parallel.pipeline)
    ledgers = tuple(_stage_ledger(cost, part, parallel, stage, stages, runtime_bytes) for stage in range(len(stages)))
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
    cost: TrainingCost, model: Model, parallel: Parallelism, stage: int, stages: list[range], runtime_bytes: int
) -> Ledger:
    """Owners scale with the weights of the stage's layers; activations with its layers and the batches in flight."""
    share, widest, outer = _shares(model, stages, stage)
    layers = len(stages[stage]) / model.num_layers
    in_flight = min(len(stages) - stage, max(1, cost.workload.accumulation_steps)) if len(stages) > 1 else 1
    experts = _expert_share(model, parallel)
    whole = cost.ledger()
    ledger = Ledger()
    for point, owners in whole.timeline.items():
        rows: dict[str, int] = {}
        for owner, tiers in owners.items():
            num_bytes = tiers.get("device", 0)
            if owner in (*SHARDED_FROM, "adapters", "packed weights", "weights (as they come)"):
                num_bytes = round(num_bytes * share * experts)
                kind = "weights" if owner == "weights (as they come)" else owner
                num_bytes = sharded_bytes(num_bytes, kind, parallel)
            elif owner == ACTIVATIONS:
                num_bytes = round(num_bytes * layers * in_flight)
            elif owner == "logits and loss" and stage != len(stages) - 1:
                num_bytes = 0
            rows[owner] = num_bytes
        if point == "update" and parallel.zero:
            rows["workspace"] = ceil(rows.get("workspace", 0) / parallel.shards)
        buffers = _buffers(cost, parallel, widest * experts, outer * experts) if point not in ("load", "save") else 0
        if buffers:
            rows[COMMUNICATION] = round(buffers)
        host = {o: rows.pop(o) for o in (STATES, "master weights") if parallel.offload and rows.get(o)}
        _book(ledger, point, rows, host, runtime_bytes)
    return ledger


def _book(ledger: Ledger, point: str, rows: Mapping[str, int], host: Mapping[str, int], runtime_bytes: int) -> None:
    if runtime_bytes:
        ledger.add(point, "runtime", "device", runtime_bytes)
        ledger.add(point, SLACK, "device", int(SLACK_FRACTION * sum(rows.values())))
    for owner, num_bytes in rows.items():
        if num_bytes:
            ledger.add(point, owner, "device", num_bytes)
    for owner, num_bytes in host.items():
        ledger.add(point, owner, "host", num_bytes)


def _buffers(cost: TrainingCost, parallel: Parallelism, widest: float, outer: float) -> float:
    """Bytes: gathered layers of fully sharded ranks, and one layer's whole gradients before they are scattered; one layer's
    gradients for the others. The embedding and the head are one unit of their own."""
    if parallel.shards == 1:
        return 0
    width = DTYPE_BYTES[cost.workload.weights_dtype]
    unit = max(widest, outer) * width
    if parallel.zero == 3:
        return GATHERED_UNITS * unit + unit
    return unit if parallel.zero == 2 else 0


def _shares(model: Model, stages: list[range], stage: int) -> tuple[float, int, int]:
    """The share of all weights that lie on a stage, the weights of its widest layer, and those outside its layers."""
    by_layer = dict.fromkeys(range(model.num_layers), 0)
    first = last = 0
    for site in model.weights:
        if site.layer is not None:
            by_layer[site.layer] += site.num_parameters
        elif site.role == "head":
            last += site.num_parameters
        else:
            first += site.num_parameters
    if model.tie_word_embeddings and len(stages) > 1:
        last = first  # the last stage holds a copy
    outer = (first if stage == 0 else 0) + (last if stage == len(stages) - 1 else 0)
    inside = sum(by_layer[layer] for layer in stages[stage])
    counted = sum(site.num_parameters for site in model.weights)
    return (inside + outer) / max(1, counted), max(by_layer[layer] for layer in stages[stage]), outer


def _expert_share(model: Model, parallel: Parallelism) -> float:
    """The share of weights left on a rank that holds `1 / expert` of the experts."""
    if parallel.expert == 1:
        return 1.0
    counted = sum(site.num_parameters for site in model.weights)
    experts = sum(site.num_parameters for site in model.weights if site.expert is not None)
    return 1 - experts / counted * (1 - 1 / parallel.expert)
