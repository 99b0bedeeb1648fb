"""Recomputation by layer: which decoder layers keep their input alone and run again for their backward pass."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from types import TracebackType
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from haversack.errors import UnsupportedModelError


class RecomputeLayers:
    """Lets the decoder layers `layers` (positions) of a transformers model recompute, and no others; usable in anybody's loop.

    As a context manager it gives the model back as it was; otherwise it lasts until `remove`. The result is the same to the bit. A layer
    that recomputes costs one more forward pass of its own and holds, until its backward pass, one hidden state per token. Source: Chen et
    al. 2016, arXiv 1604.06174, by transformers' own checkpointing of layers. Raises UnsupportedModelError where the model's layers have
    none.
    """

    def __init__(self, model: Any, layers: Collection[int]):
        self.model = model
        blocks = decoder_layers(model)
        before = {name: module.gradient_checkpointing for name, module in _switches(model)}
        self._before = before
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the newer name is not in every version that we run on
            model.gradient_checkpointing_enable(
                {"use_reentrant": False, "preserve_rng_state": has_dropout(model.config)}
            )
        for position, block in enumerate(blocks):
            block.gradient_checkpointing = position in layers

    def remove(self) -> None:
        """Let every layer do what it did before."""
        for name, module in _switches(self.model):
            module.gradient_checkpointing = self._before[name]

    def __enter__(self) -> RecomputeLayers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _switches(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "gradient_checkpointing")]


def decoder_layers(model: nn.Module) -> list[Any]:
    """The list of decoder layers; those that were left out of a trace stand in it too."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(isinstance(child, GradientCheckpointingLayer) for child in module):
            return list(module)
    raise UnsupportedModelError(
        f"{type(model).__name__} has no layers that can recompute; choose recompute none, or a family whose layers can."
    )


def has_dropout(config: Any) -> bool:
    """Whether a model drops activations at random: recomputing a layer must then draw the same again."""
    return any(
        isinstance(value, float) and value > 0
        for name, value in config.to_dict().items()
        if "dropout" in name or name.endswith("_pdrop")
    )
