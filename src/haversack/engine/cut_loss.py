"""Cut cross entropy inside a transformers model: hidden states from its base, logits never."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from haversack.describe.model import Model
from haversack.engine.quiet import quiet_transformers
from haversack.engine.reach import small_copy
from haversack.errors import UnsupportedModelError
from haversack.parts.loss.base import HeadOutput, mean_loss
from haversack.parts.loss.cut import CutCrossEntropy

PROBED = 64
"""Values that a small copy's head is made to give, to see what the model makes of them."""

TOLERANCE = 1e-4
"""Largest difference of a small copy's losses, over the loss, and of what it makes of its head's values, over the largest: rounding of
float32 sums is a hundredth of it."""


class CutLoss:
    """The loss of models with this config, whose logits are never held; usable in anybody's loop.

        loss = CutLoss(model.config)(model, labels, input_ids=ids)

    What the model does between its head and its logits (a scale, a softcap) is found by running a small random copy. Raises
    UnsupportedModelError, naming the family, where that is anything else, or where the copy's loss differs.
    """

    def __init__(self, config: PretrainedConfig, cut: CutCrossEntropy | None = None):
        self.cut = cut or CutCrossEntropy()
        kind: Any = type(config)
        self.output = _head_output(config.to_json_string(use_diff=False), kind)

    def __call__(self, model: Any, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """The mean over the next tokens whose label is not -100, in nats: `labels` `(batch, seq_len)` are the token ids, unshifted."""
        return mean_loss(self.token_losses(model, labels, **inputs), labels[:, 1:])

    def token_losses(self, model: Any, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Each next token's negative log-likelihood, float32 `(batch * (seq_len - 1),)`; 0 where its label is -100."""
        return _token_losses(model, labels, self.cut, self.output, inputs)


def _token_losses(
    model: Any, labels: torch.Tensor, cut: CutCrossEntropy, output: HeadOutput, inputs: Any
) -> torch.Tensor:
    head = model.get_output_embeddings()
    base = model.base_model
    if base is model:  # its prefix names no module: whatever is there beside the head
        base = next(child for child in model.children() if child is not head)
    hidden = base(**inputs, use_cache=False).last_hidden_state
    following = labels[:, 1:].reshape(-1)
    states = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    weight, bias = head.get_parameter("weight"), getattr(head, "bias", None)
    return cut.token_losses(states, weight, following, bias, output)


def cuts(model: Model) -> bool:
    """Whether a described model's loss can be cut."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        CutLoss(CONFIG_MAPPING[model.model_type].from_dict(dict(model.config)))
    except (UnsupportedModelError, KeyError):
        return False
    return True


@lru_cache(maxsize=16)
def _head_output(config_json: str, kind: Any) -> HeadOutput:
    import json

    config = kind.from_dict(json.loads(config_json))
    family = config.model_type
    try:
        with quiet_transformers():
            return _tried(small_copy(config), family)
    except UnsupportedModelError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{family}: its loss can't be cut; a small copy does not run ({type(error).__name__}: {error}); choose loss fp32."
        ) from error


def _tried(model: Any, family: str) -> HeadOutput:
    """What a small copy does to its head's product; its own loss and ours compared."""
    output = _fitted(model, family)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.get_output_embeddings().weight.shape[0], (2, 9), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels, use_cache=False).loss
        cut = CutCrossEntropy(block_elements=64)
        found = mean_loss(_token_losses(model, labels, cut, output, {"input_ids": ids}), labels[:, 1:])
    difference = float((found - expected).abs() / expected.abs())
    if not difference <= TOLERANCE:
        raise UnsupportedModelError(
            f"{family}: its loss can't be cut; a small copy's differs by {difference:.2g} of itself (at most {TOLERANCE:.0e} is "
            "rounding): its logits are not made from its base's last hidden states by its head alone; choose loss fp32."
        )
    return output


@torch.no_grad()
def _fitted(model: Any, family: str) -> HeadOutput:
    """The scale and softcap under which the copy's logits are what it makes of values put in its head's place."""
    values = torch.cat([torch.linspace(-100, 100, PROBED - 2), torch.tensor([1e-2, 1e6])])
    ids = torch.zeros((1, PROBED), dtype=torch.int64)

    def replaced(module: nn.Module, args: Any, product: torch.Tensor) -> torch.Tensor:
        return values[:, None].expand(PROBED, product.shape[-1])[None].to(product.dtype)

    handle = model.get_output_embeddings().register_forward_hook(replaced)
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0, :, 0].float()
    finally:
        handle.remove()
    scale = round(float(logits[-2] / values[-2]), 6)  # a softcap takes a little off
    capped = abs(float(logits[-1])) < 0.5 * abs(scale) * 1e6
    output = HeadOutput(scale, float(logits[-1]) if capped else None)
    made = scale * values
    if output.softcap is not None:
        made = output.softcap * torch.tanh(made / output.softcap)
    most = float(logits[:-1].abs().max())
    if not float((made - logits)[:-1].abs().max()) <= TOLERANCE * most:
        raise UnsupportedModelError(
            f"{family}: its loss can't be cut; what it does to its head's product is no scale and no softcap; choose loss fp32."
        )
    return output
