"""Recomputation chosen for a peak against torch's own: peak of a step's tensors against the products computed again.

`python -m benchmarks.recomputation [--eager]`. B's shape with twice its layers and whole logits, in 32 bits, forward and backward of one batch; weights and gradients are in every peak. Torch's: every layer
checkpointed; selective checkpointing that keeps products with weights and attention, all of them or every second (as torchtitan does); `torch.compile` with
`activation_memory_budget` from 0 to 1. Ours is asked for each of those peaks. Peaks are the allocator's own reports (torch's profiler), products are counted as they are computed, or in
compiled graphs. Each case has a process of its own; rows are kept, so that a stopped run goes on; with `--eager`, what
needs no compiling.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.finished_rows import FinishedRows
from benchmarks.prediction import in_fresh_process
from benchmarks.results_file import write_results
from haversack import data
from haversack.cost.training import BATCH, STATES, training_cost
from haversack.describe.model import describe_model
from haversack.describe.workload import TrainWorkload
from haversack.engine.recompute import KEPT_OPERATORS, decoder_layers
from haversack.engine.training_step import TrainingStep
from haversack.jobs.measured_run import memory_events
from haversack.jobs.training_run import open_model
from haversack.plan.recompute import choose_recomputation

WORKLOAD = TrainWorkload(4, 256, precision="fp32", optimizer="sgdm")
BUDGETS = (0.0, 0.25, 0.5, 0.75, 1.0)
LAYERS = 8

OPERATORS = [getattr(torch.ops.aten, name).default for name in KEPT_OPERATORS["products"]]


def config() -> dict[str, Any]:
    of_b = dict(describe_model(data.reference_model("b")).config)
    return {**of_b, "num_hidden_layers": LAYERS}


def measured(prepare: Callable[[Any], Callable[..., torch.Tensor]], *, compiled: bool = False) -> dict[str, Any]:
    """Peak bytes of the second of two passes, and the products of one."""
    torch.set_num_threads(1)
    graphs: list[float] = []
    ids = torch.randint(3, 4000, (WORKLOAD.batch_size, WORKLOAD.seq_len), generator=torch.Generator().manual_seed(0))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model = open_model(describe_model(config()), torch.float32, "sdpa").train()
        loss_of = prepare(model)
        if compiled:
            loss_of = torch.compile(model, backend=counting(graphs))
        loss_of(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()
        began = time.time_ns()
        loss_of(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    live = peak = 0
    for moment, num_bytes in sorted([*memory_events(profile), (began, 0)]):
        live += num_bytes
        peak = max(peak, live) if moment >= began else 0
    if not compiled:
        with FlopCounterMode(display=False) as counter:
            loss_of(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        graphs.append(counter.get_total_flops())
    return {"peak_bytes": peak, "flops": sum(graphs)}


def counting(graphs: list[float]) -> Callable[..., Any]:
    """torch's inductor, with the products of each graph that it compiles added to `graphs`."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(graph: Any, inputs: Any, **settings: Any) -> Any:
        graphs.append(sum(map(node_flops, graph.graph.nodes)))
        return compile_fx_inner(graph, inputs, **settings)

    return partial(compile_fx, inner_compile=inner)


def node_flops(node: Any) -> float:
    packet = getattr(node.target, "_overloadpacket", None)
    if node.op != "call_function" or packet not in flop_registry:
        return 0.0
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return flop_registry[packet](*args, **kwargs, out_val=node.meta["val"])


def plain(model: Any) -> Any:
    return model


def every_layer(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return model


def selective(model: Any, every: int = 1) -> Any:
    """Layers keep each `every`-th product with weights, and what attention gives."""

    def contexts() -> Any:
        seen = {False: 0, True: 0}

        def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            if operator not in OPERATORS:
                return CheckpointPolicy.PREFER_RECOMPUTE
            if operator is torch.ops.aten.mm.default:
                seen[context.is_recompute] += 1
                if seen[context.is_recompute] % every:
                    return CheckpointPolicy.PREFER_RECOMPUTE
            return CheckpointPolicy.MUST_SAVE

        return create_selective_checkpoint_contexts(policy)

    every_layer(model)
    for layer in decoder_layers(model):
        layer._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
    return model


def compiled_under(budget: float) -> dict[str, Any]:
    import torch._functorch.config as settings

    settings.activation_memory_budget = budget
    return measured(plain, compiled=True)


def theirs() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "nothing recomputed", lambda: measured(plain)
    yield "every layer checkpointed", lambda: measured(every_layer)
    yield "selective: products and attention kept", lambda: measured(selective)
    yield "selective: every second product kept", lambda: measured(lambda model: selective(model, 2))
    for budget in BUDGETS:
        yield f"compiled, budget {budget:g}", lambda budget=budget: compiled_under(budget)  # type: ignore[misc]


def ours(recompute: str) -> dict[str, Any]:
    described = describe_model(config())
    workload = dataclasses.replace(WORKLOAD, recompute=recompute)
    return measured(lambda model: TrainingStep(model, described, workload).model)


def main(*, eager: bool) -> None:
    finished, described = FinishedRows("recomputation"), describe_model(config())
    about = {"model": described.fingerprint, "workload": WORKLOAD.to_dict(), "torch": torch.__version__}
    found: dict[str, dict[str, Any]] = {}
    cases = [case for case in theirs() if not (eager and case[0].startswith("compiled"))]
    for name, measure in cases:
        found[name] = finished.get({**about, "case": name}, lambda measure=measure: in_fresh_process(measure))
        print(name, found[name], flush=True)
    least = found["nothing recomputed"]["flops"]
    staying = training_cost(described, WORKLOAD).staying
    beside = staying[STATES] + staying[BATCH]  # which these passes have none of
    rows = []
    for name, row in found.items():
        chosen = choose_recomputation(described, WORKLOAD, row["peak_bytes"] + beside)
        entry: dict[str, Any] = {"contender": name, **row, "extra_flops": row["flops"] - least}
        if chosen is not None:
            workload, cost = chosen
            own = finished.get(
                {**about, "ours": workload.recompute}, partial(in_fresh_process, partial(ours, workload.recompute))
            )
            entry["ours"] = {"recompute": workload.recompute, "predicted_bytes": cost.tensor_peak_bytes - beside, **own, "extra_flops": own["flops"] - least}  # fmt: skip
        rows.append(entry)
        print(entry, flush=True)
    notes = (
        *(("Missing: compiled steps under budgets.",) if eager else ()),
        "Extra flops are products and attention beyond those of a step that keeps everything; what lies between them is not counted.",
    )
    print(write_results("recomputation", rows, notes))


if __name__ == "__main__":
    main(eager="--eager" in sys.argv[1:])
