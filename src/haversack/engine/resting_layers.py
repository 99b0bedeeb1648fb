"""Resting layers: in each step, those layers rest whose weights last moved least; they keep no inputs and have no gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from haversack.engine.recompute import decoder_layers
from haversack.errors import UsageError

DEFAULT_SHARE = 0.5
"""Of the layers."""

SAMPLED_NUMBERS = 1024
"""Numbers of each tensor, evenly spread, by which a layer's movement is told."""


class RestingLayers:
    """Of a transformers model's decoder layers, a `share` rests in each step; usable in anybody's loop: `rest()`, a backward pass, and the optimizer's step within `watched()`.

    A resting layer's weights are frozen: its linears keep none of their inputs for the backward pass (what lies between them is kept as ever; `SaveInEightBits` besides rounds it), and
    there are no gradients of them. After each step the layers that rest are those that moved least when they last ran: mean change over mean magnitude, of a sample of each tensor. Layers that never ran come
    before all others, from the last to the first; as many rest in each step, so that bytes are known before. Source: Ardakani et al. 2023, arXiv 2305.18513, section 3 (freezing by the distance that
    weights move, scheduled between layers); differs in that whole decoder layers rest, and in that distances are those of samples. Raises UsageError for a share that is none, or of which no layer remains.
    """

    def __init__(self, model: Any, share: float = DEFAULT_SHARE):
        if not 0 < share < 1:
            raise UsageError(f"the share of layers is {share!r}, but must lie above 0 and below 1.")
        self.layers: Sequence[nn.Module] = decoder_layers(model)
        self.num_resting = int(share * len(self.layers))
        if not self.num_resting:
            raise UsageError(f"no whole layer is {share:g} of {len(self.layers)}; keep activations as they are.")
        self.distances = [inf] * len(self.layers)

    @property
    def resting(self) -> tuple[int, ...]:
        """The layers that rest now, by their position."""
        order = sorted(range(len(self.layers)), key=lambda layer: (self.distances[layer], layer))
        return tuple(sorted(order[: self.num_resting]))

    def parameters(self, layers: Sequence[int] | None = None) -> Iterator[nn.Parameter]:
        """The weights of some layers (all, if left out)."""
        for layer in range(len(self.layers)) if layers is None else layers:
            if isinstance(self.layers[layer], GradientCheckpointingLayer):  # a trace leaves some out
                yield from self.layers[layer].parameters()

    def rest(self) -> None:
        """Let the layers rest whose turn it is, and no others."""
        asleep = {id(parameter) for parameter in self.parameters(self.resting)}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) not in asleep)

    def wake(self) -> None:
        """Let every layer be trained."""
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While weights are updated: notes how far those that ran move, and then chooses who rests."""
        awake = [layer for layer in range(len(self.layers)) if layer not in self.resting]
        before = {layer: self._sample(layer) for layer in awake}
        yield
        for layer in awake:
            moved = (self._sample(layer) - before[layer]).abs_().mean()
            self.distances[layer] = float(moved / before[layer].abs().mean().clamp(min=1e-30))
        self.rest()

    @torch.no_grad()
    def _sample(self, layer: int) -> torch.Tensor:
        """Float32, in the order of the layer's tensors."""
        flat = (parameter.detach().flatten() for parameter in self.parameters([layer]))
        return torch.cat([p[:: _stride(p.numel())].float() for p in flat])


def _stride(num_elements: int) -> int:
    return max(1, num_elements // SAMPLED_NUMBERS)


def sample_bytes(num_elements: int) -> int:
    """What is held of a tensor while it is updated."""
    return 4 * -(-num_elements // _stride(num_elements))
