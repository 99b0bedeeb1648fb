"""A side network beside a frozen model: small layers read its hidden states, so that no gradient ever passes through the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from haversack.describe.checkpoint import Checkpoint
from haversack.engine.recompute import decoder_layers
from haversack.errors import CheckpointError
from haversack.formats.output import write_whole
from haversack.formats.safetensors_file import write_tensors

CONFIG_NAME, WEIGHTS_NAME = "side_config.json", "side_network.safetensors"
REDUCTION = 8
"""How many times wider the model is than its side network, at least."""


class SideLayer(nn.Module):
    """`m = g p + (1 - g) h`, then `m + W2 (silu(a) * b)` with `(a, b) = W1 norm(m)`: `h` comes from the side layer below, `p` is the
    model's hidden state averaged over groups of its numbers and normed."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.inner = nn.Parameter(torch.empty(4 * width, width, dtype=dtype))
        self.outer = nn.Parameter(torch.empty(width, 2 * width, dtype=dtype))
        with torch.no_grad():
            self.inner.normal_(std=width**-0.5)
            self.outer.normal_(std=0.1 * (2 * width) ** -0.5)

    def forward(self, hidden: torch.Tensor, below: torch.Tensor | None) -> torch.Tensor:
        width = self.outer.shape[0]
        gate = self.gate.sigmoid().to(hidden.dtype)
        mixed = gate * F.rms_norm(hidden.unflatten(-1, (width, -1)).mean(-1), (width,))
        if below is not None:
            mixed = mixed + (1 - gate) * below
        a, b = F.linear(F.rms_norm(mixed, (width,)), self.inner.to(hidden.dtype)).chunk(2, -1)
        return mixed + F.linear(F.silu(a) * b, self.outer.to(hidden.dtype))


class SideNetwork(nn.Module):
    """Puts a side layer into each decoder layer of `model`, freezes the model, and adds what the last one says to its last hidden state.

    Per token and layer some ten numbers per number of its width are kept for the backward pass, and nothing of the model's own. The
    model must hold `side_network` as long as it is used; logits are the model's own until something was learned. Averages instead of
    learned projections, since these would keep the model's hidden states. Source: Sung et al. 2022, arXiv 2206.06522 (ladders, gates), and
    Zhang et al. 2024, arXiv 2401.07159 (frozen models in few bits, reduction without gradients); differs in that side layers mix no
    tokens, so that they work with any cache.
    """

    def __init__(self, model: Any, dtype: torch.dtype):
        super().__init__()
        layers = decoder_layers(model)
        hidden_size = model.get_output_embeddings().weight.shape[1]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.width = max(w for w in range(1, max(1, hidden_size // REDUCTION) + 1) if hidden_size % w == 0)
        self.lift = nn.Parameter(torch.zeros(hidden_size, self.width, dtype=dtype))
        self._said: torch.Tensor | None = None
        for layer in layers:
            if isinstance(layer, GradientCheckpointingLayer):  # a trace leaves layers out
                layer.side = SideLayer(self.width, dtype)
                layer.register_forward_hook(self._climb)
        base = model.base_model
        base.register_forward_pre_hook(self._begin)
        base.register_forward_hook(self._add)
        model.side_network = self

    def _begin(self, base: nn.Module, args: Any) -> None:
        self._said = None

    def _climb(self, layer: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._said = layer.side(hidden, self._said)

    def _add(self, base: nn.Module, args: Any, output: Any) -> Any:
        said, self._said = self._said, None
        assert said is not None, "the model has layers"
        norm = F.rms_norm(said, (self.width,))
        output.last_hidden_state = output.last_hidden_state + F.linear(norm, self.lift.to(norm.dtype))
        return output


def side_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A side network's weights by name; none where there is none."""
    return {name: p for name, p in model.named_parameters() if ".side." in name or name.startswith("side_network.")}


def save_side_network(model: nn.Module, folder: Path, base_model: str) -> None:
    """Write a model's side network; one tensor at a time."""
    tensors = side_parameters(model)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    write_whole(
        folder / CONFIG_NAME, json.dumps({"base_model": base_model, "num_tensors": len(tensors)}, indent=2) + "\n"
    )


def load_side_network(model: Any, folder: Path) -> SideNetwork:
    """Put a saved side network beside a loaded model, which then answers with it, `generate` too. Raises CheckpointError where it is of
    a model of another shape."""
    tensors = Checkpoint.open(folder)
    first = next(iter(tensors.tensors))
    network = SideNetwork(model, tensors.read(first).dtype)
    own = side_parameters(model)
    if {name: tuple(p.shape) for name, p in own.items()} != {name: t.shape for name, t in tensors.tensors.items()}:
        raise CheckpointError(
            f"{folder} holds a side network of a model of another shape; name the one it was tuned beside."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors.read(name))
    return network
