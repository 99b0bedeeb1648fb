"""Second moments of inputs whose tokens count by how much attention they get: one more forward pass, kept beside the others.

A token's features are multiplied, before they meet in `x x^T`, by its share of a layer's attention (summed over heads and
queries), scaled within its sequence from `LEAST_WEIGHT` to 1. Source: Sung, Yadav, Li, Yoon and Bansal 2025 (RSQ, arXiv 2503.01820, section 4:
"AttnCon"); experts that see some of the tokens keep weights of 1.

Memory: as in calibration's forward pass, and a layer's attention of `QUERIES` tokens of one sequence. Disk: `4 in^2` bytes per distinct input.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from haversack.engine.attention import registered
from haversack.engine.hidden_states import HiddenStates
from haversack.engine.layers import StreamedModel
from haversack.engine.moments import batches, moment_rounds, shared_products, trace_inputs, watched_parameters
from haversack.engine.observe import ProductKey, ProductObserver, SecondMoment
from haversack.engine.site_statistics import ATTENDED, MomentWriter, layer_file, write_text

LEAST_WEIGHT = 0.1
"""Of a sequence's least attended token, where the most attended has 1: ours, within the range that the source tried."""

QUERIES = 256
_NAME = "haversack-attended"

Progress = Callable[[str, int, int], None]


@torch.no_grad()
def collect_attended(
    model: StreamedModel,
    token_ids: torch.Tensor,
    folder: Path,
    *,
    batch_tokens: int = 4096,
    statistics_bytes: int = 4 * 2**30,
    progress: Progress | None = None,
) -> None:
    """Write every layer's moments of weighted `token_ids` `(sequences, tokens)` into a calibration's folder, unless they are there."""
    done = folder / f"{ATTENDED}.json"
    if done.exists():
        return
    tell = progress or (lambda what, done, total: None)
    num_sequences, num_tokens = token_ids.shape
    parts = batches(num_sequences, max(1, batch_tokens // num_tokens))
    scratch = folder / f"scratch-{ATTENDED}"
    shutil.rmtree(scratch, ignore_errors=True)
    states = HiddenStates(scratch, num_tokens, model.described.hidden_size, model.compute_dtype)
    hidden = states.create("hidden-0", num_sequences)
    with model.before_layers() as embed:
        for part in parts:
            hidden[part] = embed(token_ids[part])
    states.finish("hidden-0")
    for layer in range(model.num_layers):
        tell("weighing tokens by attention", layer, model.num_layers)
        hidden = states.open(f"hidden-{layer}", num_sequences)
        after = states.create(f"hidden-{layer + 1}", num_sequences)
        _collect_layer(model, layer, hidden, after, parts, folder, statistics_bytes)
        states.finish(f"hidden-{layer + 1}")
        states.remove(f"hidden-{layer}")
    shutil.rmtree(scratch)
    write_text(done, json.dumps({"tokens": token_ids.numel(), "least_weight": LEAST_WEIGHT}))


def _collect_layer(
    model: StreamedModel,
    layer: int,
    hidden: torch.Tensor,
    after: torch.Tensor,
    parts: list[slice],
    folder: Path,
    statistics_bytes: int,
) -> None:
    writer = MomentWriter(folder, f"{layer_file(layer)}.{ATTENDED}")
    with model.layer(layer):
        watched = watched_parameters(model, layer)
        sharing = trace_inputs(model, layer, watched, hidden[:1])
        for keys in moment_rounds(sharing, watched, statistics_bytes):
            moments: dict[ProductKey, SecondMoment] = {}
            for part in parts:
                inputs: list[tuple[ProductKey, torch.Tensor]] = []
                with (
                    _Received(model) as received,
                    ProductObserver(watched, on_input=lambda k, x: inputs.append((k, x))),  # noqa: B023
                ):
                    after[part] = model.run_layer(layer, hidden[part])
                weights = received.weights()
                for key, x in inputs:
                    if key in keys:
                        moment = moments.setdefault(key, SecondMoment(x.shape[1]))
                        moment.add(x.float() * weights[:, None] if len(weights) == len(x) else x)
            writer.add(moments)
        writer.finish(shared_products(sharing, watched))


class _Received:
    """While it is entered, notes how much attention each token of what runs gets."""

    def __init__(self, model: StreamedModel):
        self._registered = registered(model.module, _NAME, self._attend)
        self._sums: list[torch.Tensor] = []

    def __enter__(self) -> _Received:
        self._registered.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._registered.__exit__(*error)

    def weights(self) -> torch.Tensor:
        """`(sequences * tokens,)`; empty where no attention ran."""
        if not self._sums:
            return torch.empty(0)
        received = torch.stack(self._sums).sum(0)
        low, high = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
        return (LEAST_WEIGHT + (1 - LEAST_WEIGHT) * (received - low) / (high - low).clamp_min(1e-12)).flatten()

    def _attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, **kwargs: Any
    ) -> Any:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        self._sums.append(torch.stack([_received(q, k, kwargs) for q, k in zip(query, key, strict=True)]))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _received(query: torch.Tensor, key: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """What every token of one sequence gets of the attention of all queries `(heads, tokens, head_dim)`, summed: `(tokens,)`."""
    num_tokens = query.shape[1]
    keys = key.float().repeat_interleave(query.shape[0] // key.shape[0], dim=0).transpose(-1, -2)
    places, total = torch.arange(num_tokens), torch.zeros(num_tokens)
    for some in places.split(QUERIES):
        scores = query[:, some].float() @ keys * (kwargs.get("scaling") or query.shape[-1] ** -0.5)
        distance = some[:, None] - places
        hidden = distance < 0
        if (window := kwargs.get("sliding_window")) is not None:
            hidden |= distance >= window
        total += scores.masked_fill(hidden, -torch.inf).softmax(-1).sum((0, 1))
    return total
