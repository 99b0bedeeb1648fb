"""What compiled steps will allocate, from a model's config alone: its own code is traced on tensors without memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from haversack.describe.checkpoint import torch_dtype
from haversack.describe.model import Model
from haversack.describe.skeleton import build_skeleton, to_loaded_dtype
from haversack.engine.attention import NAME, register
from haversack.engine.decoder.loop import make_tables, step_bytes, table_tokens
from haversack.engine.decoder.schedule import schedule_step
from haversack.engine.decoder.trace import TRACE_ATTENTION, StepGraph, trace_step
from haversack.engine.profile import layer_kinds
from haversack.engine.trace import LiveBytes
from haversack.errors import UnsupportedModelError

SHALLOW_LAYERS = (4, 5)
"""Depths that stand for any; below four, buffers of the first and the last layer hide what one in between adds."""


@dataclass(frozen=True)
class StepForecast:
    """What compiled steps hold beside kernels' workspace (0 where they are not compiled), and what making them takes:
    the model's step is traced once it is loaded, up to where a refused one is refused."""

    step_bytes: int
    tracing_bytes: int


_KNOWN: dict[tuple[str, int], StepForecast] = {}
"""By the model's fingerprint and the batch: a planner asks again for every prefill chunk that it tries."""


def forecast_step(model: Model, batch_size: int) -> StepForecast:
    """What compiled steps for `batch_size` sequences will take."""
    key = (model.fingerprint, batch_size)
    if key not in _KNOWN:
        _KNOWN[key] = _forecast(model, batch_size)
    return _KNOWN[key]


def _forecast(model: Model, batch_size: int) -> StepForecast:
    """Where a deep model's layers are all of one kind, steps of two depths are traced: each further layer adds the same."""
    register()
    shallow, deeper = SHALLOW_LAYERS
    one_kind = len(set(layer_kinds(model).values())) == 1
    if not one_kind or model.num_layers <= 2 * deeper or "num_hidden_layers" not in model.config:
        return _trace(model, model.config, model.num_layers, batch_size)
    few, more = (
        _trace(model, {**model.config, "num_hidden_layers": depth}, depth, batch_size) for depth in SHALLOW_LAYERS
    )

    def of_all(at_few: int, at_more: int) -> int:
        return at_more + (at_more - at_few) // (deeper - shallow) * (model.num_layers - deeper)

    return StepForecast(
        of_all(few.step_bytes, more.step_bytes),
        of_all(few.tracing_bytes, more.tracing_bytes),
    )


def _trace(model: Model, config: Mapping[str, Any], num_layers: int, batch_size: int) -> StepForecast:
    skeleton: Any = build_skeleton(config, model.name)
    to_loaded_dtype(skeleton, torch_dtype(model.dtype))
    skeleton.eval()
    with LiveBytes() as live:
        live.leave_out([*skeleton.parameters(), *skeleton.buffers()])  # GPT-2's weights are met transposed
        try:
            graph = trace_step(skeleton, num_layers, NAME)
            schedule_step(graph, batch_size)
        except UnsupportedModelError:
            graph = None
    if graph is None:
        return StepForecast(0, live.peak_bytes)
    made = _tables_bytes(skeleton, num_layers, graph, batch_size)
    return StepForecast(step_bytes(graph, batch_size, made), live.peak_bytes)


def _tables_bytes(skeleton: Any, num_layers: int, graph: StepGraph, batch_size: int) -> int:
    """The most that making tables of positions holds, them included."""
    ahead = table_tokens(skeleton.config)
    skeleton.set_attn_implementation(TRACE_ATTENTION)  # whose masks ask for no values
    with LiveBytes() as live:
        live.leave_out([*skeleton.parameters(), *skeleton.buffers()])
        positions = torch.zeros(batch_size, ahead, dtype=torch.int64, device="meta")
        tables = make_tables(skeleton, num_layers, graph, positions)
        del tables
    return live.peak_bytes
