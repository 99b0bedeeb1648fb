"""What compiled steps will allocate, from a model's config alone: its own code is traced on tensors without memory."""

from __future__ import annotations

from typing import Any

from haversack.describe.checkpoint import torch_dtype
from haversack.describe.model import Model
from haversack.describe.skeleton import build_skeleton
from haversack.engine.attention import NAME, register
from haversack.engine.decoder.loop import step_bytes
from haversack.engine.decoder.trace import trace_step
from haversack.errors import UnsupportedModelError

_KNOWN: dict[tuple[str, int], int] = {}
"""By the model's fingerprint and the batch: a planner asks again for every prefill chunk that it tries."""


def decode_step_bytes(model: Model, batch_size: int) -> int:
    """Bytes of a step's buffers beside kernels' workspace; 0 where steps are not compiled."""
    key = (model.fingerprint, batch_size)
    if key not in _KNOWN:
        _KNOWN[key] = _traced_bytes(model, batch_size)
    return _KNOWN[key]


def _traced_bytes(model: Model, batch_size: int) -> int:
    register()
    skeleton: Any = build_skeleton(model.config, model.name)
    skeleton.to(torch_dtype(model.dtype)).eval()
    try:
        return step_bytes(trace_step(skeleton, model.num_layers, NAME), batch_size)
    except UnsupportedModelError:
        return 0
