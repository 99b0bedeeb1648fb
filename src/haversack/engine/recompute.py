"""Recomputation by layer and operator: which decoder layers run again for their backward pass, and what of their first run they keep."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from haversack.errors import UnsupportedModelError

_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
KEPT_OPERATORS = {"attention": _ATTENTION, "products": (*_ATTENTION, "mm", "addmm")}
"""Operators of `torch.ops.aten` whose results are kept. Attention that multiplies by itself (eager) is computed again."""


class RecomputeLayers:
    """Lets decoder layers of a transformers model recompute, and no others; usable in anybody's loop.

    `layers` are positions, or maps each to what it keeps of its first run (a key of `KEPT_OPERATORS`, or "" for nothing). As a context manager
    it gives the model back as it was; otherwise it lasts until `remove`. The result is the same to the bit. A layer that recomputes costs
    one more forward pass of its own, without the operators whose results it keeps, and holds, until its backward pass, one hidden state per token and those
    results. Sources: Chen et al. 2016, arXiv 1604.06174, by transformers' own checkpointing of layers; Korthikanti et al. 2022, arXiv
    2205.05198, section 5 (selective by operator), by torch's. Raises UnsupportedModelError where the model's layers have none.
    """

    def __init__(self, model: Any, layers: Collection[int] | Mapping[int, str]):
        self.model = model
        blocks = decoder_layers(model)
        self._before = {name: module.gradient_checkpointing for name, module in _switches(model)}
        settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": has_dropout(model.config)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the newer name is not in every version that we run on
            model.gradient_checkpointing_enable(settings)
        for position, block in enumerate(blocks):
            block.gradient_checkpointing = position in layers
            if isinstance(layers, Mapping) and layers.get(position):
                contexts = partial(create_selective_checkpoint_contexts, _operators(layers[position]))
                block._gradient_checkpointing_func = partial(checkpoint, context_fn=contexts, **settings)

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


def _operators(kept: str) -> list[Any]:
    return [getattr(torch.ops.aten, name).default for name in KEPT_OPERATORS[kept]]


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
