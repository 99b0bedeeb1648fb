"""What compiled steps will allocate, from a model's config alone: its own code is traced on tensors without memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from haversack.describe.checkpoint import torch_dtype
from haversack.describe.model import Model
from haversack.describe.skeleton import build_skeleton
from haversack.engine.attention import NAME, register
from haversack.engine.decoder.loop import step_bytes
from haversack.engine.decoder.trace import trace_step
from haversack.engine.profile import layer_kinds
from haversack.errors import UnsupportedModelError

SHALLOW_LAYERS = (4, 8)
"""Depths that stand for any; below four, buffers of the first and the last layer hide what one in between adds."""

_KNOWN: dict[tuple[str, int], int] = {}
"""By the model's fingerprint and the batch: a planner asks again for every prefill chunk that it tries."""


def decode_step_bytes(model: Model, batch_size: int) -> int:
    """Bytes of a step's buffers beside kernels' workspace; 0 where steps are not compiled."""
    key = (model.fingerprint, batch_size)
    if key not in _KNOWN:
        _KNOWN[key] = _traced_bytes(model, batch_size)
    return _KNOWN[key]


def _traced_bytes(model: Model, batch_size: int) -> int:
    """Where a deep model's layers are all of one kind, steps of two depths are traced: each further layer adds the same."""
    register()
    shallow, deeper = SHALLOW_LAYERS
    one_kind = len(set(layer_kinds(model).values())) == 1
    if not one_kind or model.num_layers <= 2 * deeper or "num_hidden_layers" not in model.config:
        return _step_bytes(model, model.config, model.num_layers, batch_size)
    few, more = (
        _step_bytes(model, {**model.config, "num_hidden_layers": depth}, depth, batch_size) for depth in SHALLOW_LAYERS
    )
    return more + (more - few) // (deeper - shallow) * (model.num_layers - deeper)


def _step_bytes(model: Model, config: Mapping[str, Any], num_layers: int, batch_size: int) -> int:
    skeleton: Any = build_skeleton(config, model.name)
    skeleton.to(torch_dtype(model.dtype)).eval()
    try:
        return step_bytes(trace_step(skeleton, num_layers, NAME), batch_size)
    except UnsupportedModelError:
        return 0
