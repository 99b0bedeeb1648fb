"""How far each layer, and each sublayer, turns the hidden states that pass it: 1 less their cosine, mean over tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from haversack.engine.layers import StreamedModel
from haversack.engine.moments import watched_parameters
from haversack.engine.observe import ProductKey, ProductObserver

ENDS = {"output": "attention", "down": "feed-forward"}
"""Roles of the matrices whose products are added to what passes by, and the sublayers that they end."""


@dataclass(frozen=True)
class LayerChange:
    """Of one layer: `whole`, and by sublayer as far as it ends in one matrix whose product is added as it is."""

    whole: float
    parts: dict[str, float]


@torch.no_grad()
def layer_changes(model: StreamedModel, token_ids: torch.Tensor) -> tuple[LayerChange, ...]:
    """Of every layer, on `token_ids` `(sequences, tokens)`; one layer in memory at a time, all hidden states in memory."""
    found = []
    with model.before_layers() as embed:
        hidden = embed(token_ids)
    for layer in range(model.num_layers):
        ends = {f"{s.module}.{s.parameter}": ENDS[s.role] for s in model.layer_sites(layer) if s.role in ENDS}
        products: dict[str, torch.Tensor] = {}

        def note(key: ProductKey, x: torch.Tensor, y: torch.Tensor) -> None:
            if key.expert < 0 and key.parameter in ends:  # noqa: B023
                products[ends[key.parameter]] = y.reshape(hidden.shape)  # noqa: B023

        with model.layer(layer), ProductObserver(watched_parameters(model, layer), on_output=note):
            after = model.run_layer(layer, hidden)
        parts: dict[str, float] = {}
        passing = hidden
        for name in ("attention", "feed-forward"):
            if name in products:
                parts[name] = _change(passing, passing + products[name])
                passing = passing + products[name]
        found.append(LayerChange(_change(hidden, after), parts))
        hidden = after
    return tuple(found)


def _change(before: torch.Tensor, after: torch.Tensor) -> float:
    return 1 - float(torch.cosine_similarity(before.float(), after.float(), dim=-1).mean())
