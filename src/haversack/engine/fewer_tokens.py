"""Fewer tokens: all layers but the first and the last run, while tuning, those tokens alone that the layers before them changed most."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from haversack.engine.recompute import decoder_layers
from haversack.engine.rerouted import Rerouted
from haversack.errors import UnsupportedModelError, UsageError

DEFAULT_SHARE = 0.75
"""Of each sequence's tokens: at half of them model B gained 59% of what it gains with all in 25 steps, at three quarters 82% (docs/failures.md)."""

LEAST_LAYERS = 3
"""Below it there is no layer between the first and the last."""


class FewerTokens(Rerouted):
    """While it lasts, a transformers model in training runs its inner decoder layers on a `share` of each sequence's tokens; usable in anybody's loop.

    Other tokens pass a layer as they are: they are not attended to there, and nothing of them is kept for the backward pass, so that an inner layer keeps `ceil(share * tokens) / tokens` of its activations. A layer runs
    the tokens whose hidden states were turned furthest by the last layer that ran them (1 less the cosine), and each sequence's first one, which heads attend to when nothing else is worth it; they keep order, positions and masks. In
    evaluation, and without gradients, every token runs. Gradients are those of the model that ran. As a context manager it gives the model back as it was; otherwise it lasts until `remove`. Source: Wang et al.
    2025, arXiv 2501.09767 (tokens eliminated layer by layer); differs in that tokens are told by how layers changed them, not by predicted attention, and in that every layer runs as many, so that bytes are known
    before. Raises UsageError for a share that is none and a model of fewer than three layers; UnsupportedModelError where layers are given something else per token.
    """

    def __init__(self, model: Any, share: float = DEFAULT_SHARE):
        if not 0 < share < 1:
            raise UsageError(f"the share of tokens is {share!r}, but must lie above 0 and below 1.")
        layers = decoder_layers(model)
        if len(layers) < LEAST_LAYERS:
            raise UsageError(
                f"layers between the first and the last would run fewer tokens, but the model has {len(layers)}; keep activations as they are."
            )
        self.share, self._last = share, len(layers) - 1
        self._turned: torch.Tensor | None = None
        super().__init__(
            {
                layer: partial(self._forward, position, layer, layer.forward)
                for position, layer in enumerate(layers)
                if isinstance(layer, GradientCheckpointingLayer)  # a trace leaves some out
            }
        )

    def _forward(
        self, position: int, layer: Any, run: Callable[..., Any], hidden: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if not layer.training or not torch.is_grad_enabled() or position == self._last:
            return run(hidden, *args, **kwargs)
        if position == 0 or self._turned is None:
            output = run(hidden, *args, **kwargs)
            self._turned = turned(hidden, _states(output))
            return output
        kept = self._chosen(self._turned)
        sequences, tokens, width = hidden.shape
        flat = (kept + tokens * torch.arange(sequences, device=kept.device)[:, None]).flatten()
        rows = hidden.flatten(0, 1).index_select(0, flat).view(sequences, -1, width)
        names = list(inspect.signature(run).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        output = run(rows, **{name: _cut(name, value, kept, hidden) for name, value in given.items()})
        states = _states(output)
        self._turned = self._turned.scatter(1, kept, turned(rows, states))
        whole = hidden.flatten(0, 1).index_put((flat,), states.flatten(0, 1)).view(hidden.shape)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    def _chosen(self, scores: torch.Tensor) -> torch.Tensor:
        """Positions that run `(sequences, kept)`, in order."""
        count = ceil(self.share * scores.shape[1])
        first = torch.arange(scores.shape[1], device=scores.device) == 0
        return scores.masked_fill(first, float("inf")).topk(count, 1).indices.sort(1).values


def _states(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def turned(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """How far each token's hidden state was turned, float32 `(sequences, tokens)` of `(sequences, tokens, hidden)`: from 0 to 2."""
    return 1 - F.cosine_similarity(before.float(), after.float(), dim=-1)


PER_TOKEN = ("position_ids", "position_embeddings", "attention_mask")
"""What decoder layers are given of each token."""


def _cut(name: str, value: Any, kept: torch.Tensor, hidden: torch.Tensor) -> Any:
    """What a layer is given, for the tokens that run alone."""
    sequences, tokens = hidden.shape[:2]
    if isinstance(value, tuple | list):
        return type(value)(_cut(name, item, kept, hidden) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    if name == "attention_mask" and value.ndim == 4:
        mask = value.expand(sequences, *value.shape[1:]).take_along_dim(kept[:, None, :, None], 2)
        return mask.take_along_dim(kept[:, None, None, :], 3)
    if name in PER_TOKEN and value.ndim >= 2 and value.shape[1] == tokens:
        index = kept.view(*kept.shape, *[1] * (value.ndim - 2))
        return value.expand(sequences, *value.shape[1:]).take_along_dim(index, 1)
    if tokens in value.shape:
        raise UnsupportedModelError(
            f"the model's layers are given {name} of shape {tuple(value.shape)} for {tokens} tokens, which can't be cut to fewer; keep activations as they are."
        )
    return value
