"""Seconds of a training step from a roofline: products at the machine's rate, weights and states at its bandwidth.

Every micro-batch reads the weights anew; recomputing layers is a forward pass more, without what they keep, a cut loss makes the logits twice. What lies between products
and attention is left out, so that the figure is a bound from below, good for comparing choices.
"""

from __future__ import annotations

from math import prod

from haversack.cost.roofline import attention_flops
from haversack.cost.training import TrainingCost
from haversack.describe.machine import Machine
from haversack.describe.model import Model
from haversack.describe.workload import TrainingWorkload, TuneWorkload, recomputation

ASSUMED_FLOPS_PER_SECOND, ASSUMED_BYTES_PER_SECOND = 2e11, 2e10
"""Of a machine whose rates nobody measured: their ratio decides comparisons alone."""

UNPACK_BYTES_PER_WEIGHT = 12
"""What unpacking one weight of a packed base reads and writes, for each product: codes, 32-bit values, the matrix."""


def training_seconds(model: Model, cost: TrainingCost, machine: Machine) -> float:
    """Seconds of one step of the optimizer, accumulation included."""
    workload = cost.workload
    rate = machine.matmul_rate("fp32" if workload.precision == "fp32" else "bf16") or ASSUMED_FLOPS_PER_SECOND
    bandwidth = machine.read_rate() or ASSUMED_BYTES_PER_SECOND
    inside, outside = _product_weights(model)
    frozen = isinstance(workload, TuneWorkload) and workload.method != "full"
    whole_gradients = isinstance(workload, TuneWorkload) and workload.method == "peqa"  # summed over groups
    passes = 2.0 if frozen and not whole_gradients else 3.0  # forward, gradients of inputs, gradients of weights
    beside = isinstance(workload, TuneWorkload) and workload.method == "side"
    inner = 1.0 if beside else passes  # no gradient passes through layers that a side network reads
    kept = recomputation(workload.recompute, model.num_layers)
    shares = layer_work(model)
    again = sum(shares[layer] for layer, what in kept.items() if what != "products")
    flops_again = sum(recomputed_flops(model, workload, what)[layer] for layer, what in kept.items())
    logits_again = 1.0 if workload.loss == "cut" else 0.0
    flops = 2 * workload.step_tokens * (inner * inside + (passes + logits_again) * outside)
    flops += workload.accumulation_steps * flops_again
    weight_bytes = sum(cost.staying.get(owner, 0) for owner in ("weights", "packed weights", "adapters"))
    reads = workload.accumulation_steps * (inner + again) * weight_bytes
    if cost.staying.get("packed weights"):
        reads += workload.accumulation_steps * (2 + again) * UNPACK_BYTES_PER_WEIGHT * inside
    trained = cost.trace.gradient_bytes
    update = 3 * trained + 2 * (cost.state_bytes + cost.staying.get("master weights", 0))
    return flops / rate + (reads + update) / bandwidth


def recomputed_flops(model: Model, workload: TrainingWorkload, kept: str) -> tuple[float, ...]:
    """Of each layer, what running it again for one batch multiplies: products with weights and attention, but for what it `kept`."""
    shares, (inside, _) = layer_work(model), _product_weights(model)
    tokens, length = workload.batch_size * workload.seq_len, workload.seq_len
    found = [0.0 if kept == "products" else 2 * tokens * inside * share for share in shares]
    if not kept:
        for site in model.attention:
            found[site.layer] += workload.batch_size * attention_flops(site, length * (length + 1) / 2, length)
    return tuple(found)


def layer_work(model: Model) -> tuple[float, ...]:
    """Each layer's share of the products of a forward pass through all layers, by its weights (of experts, all)."""
    weights = [0] * model.num_layers
    for site in model.weights:
        if site.layer is not None:
            weights[site.layer] += site.num_parameters
    return tuple(number / max(1, sum(weights)) for number in weights)


def _product_weights(model: Model) -> tuple[float, float]:
    """Weights that each token is multiplied with: inside the layers, and in the head. Of stacked experts, those that a token
    is sent to."""
    chosen = model.config.get("num_experts_per_tok")
    experts = {site.expert for site in model.weights if site.expert is not None}
    share = float(chosen) / len(experts) if chosen and experts else 1.0
    inside = outside = 0.0
    for site in model.weights:
        if site.layer is not None:
            inside += site.num_parameters * (share if site.expert is not None else 1.0)
        elif site.role == "head" or site.tied_modules:
            outside += prod((site.out_features, site.in_features))
    return inside, outside
