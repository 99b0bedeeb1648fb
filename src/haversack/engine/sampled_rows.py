"""Sampled rows: linears keep some of their inputs' rows for the gradient of their weight, chosen so that it is right on average."""

from __future__ import annotations

import weakref
from functools import partial
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from haversack.engine.recompute import decoder_layers
from haversack.engine.rerouted import Rerouted
from haversack.errors import UsageError

DEFAULT_SHARE = 0.3
"""Of the rows (Liu et al. 2023, section 4.2: no accuracy lost down to this)."""


def choose_rows(x: torch.Tensor, share: float, *, winners: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of `x` `(tokens, in)`, weights): of `ceil(share * tokens)` rows, with repetition, such that `sum w_i g_i x_i^T` is on average the sum over all rows.

    Rows are drawn in proportion to their norms. With `winners`, the largest are taken for certain, as many as make the bound on the variance least (equation 7), and only the rest is
    drawn. The number of rows does not depend on values.
    """
    count = ceil(share * len(x))
    norms = torch.linalg.vector_norm(x.detach(), dim=1, dtype=torch.float32).add_(torch.finfo(torch.float32).tiny)
    chances, order = (norms / norms.sum()).sort(descending=True)
    place = torch.arange(count, device=x.device)
    before = chances.cumsum(0)[:count] - chances[:count]  # taken by the rows that come first
    taken = (
        ((1 - before) / (count - place)).argmin() if winners else torch.zeros((), dtype=torch.int64, device=x.device)
    )
    rest = chances.masked_fill(torch.arange(len(x), device=x.device) < taken, 0.0).add_(torch.finfo(torch.float32).tiny)
    drawn = torch.multinomial(rest, count, replacement=True)
    certain = place < taken
    rows = torch.where(certain, place, drawn)
    weights = rest.sum() / (rest[rows] * (count - taken))
    return order[rows], torch.where(certain, torch.ones_like(weights), weights)


class SampleRows(Rerouted):
    """While it lasts, the trained linears of a transformers model's decoder layers keep a `share` of their inputs' rows; usable in anybody's loop.

    Forward results and gradients of inputs are exact, gradients of weights are right on average. Linears with one input keep the same rows, once. As a context manager it gives the model back as
    it was; otherwise it lasts until `remove`. Source: Liu et al. 2023, arXiv 2305.15265 (catalogue: wta-crs), equations 6 and 7; differs in that rows are weighed by the norms of inputs alone, and not also of
    gradients of an earlier step, which would have to be kept for each sample. Raises UsageError where no linear is trained, and for a share that is none.
    """

    def __init__(self, model: Any, share: float = DEFAULT_SHARE):
        if not 0 < share < 1:
            raise UsageError(f"the share of rows is {share!r}, but must lie above 0 and below 1.")
        self.share = share
        self._last: tuple[weakref.ref[Any], Any, _Kept] | None = None
        layers = decoder_layers(model)
        linears = [
            m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad
        ]
        if not linears:
            raise UsageError(
                "rows of inputs can be sampled where linears are trained, but none is; keep activations as they are."
            )
        super().__init__({linear: partial(self._forward, linear) for linear in linears})

    def _forward(self, linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, linear.weight, linear.bias)
        y = _SampledProduct.apply(x, linear.weight, self._kept(x))
        return y if linear.bias is None else y + linear.bias

    def _kept(self, x: torch.Tensor) -> _Kept:
        """The rows kept of an input: those of the last linear, where it had the same."""
        key = (x.storage_offset(), x.shape, x._version)
        if self._last is not None and self._last[0]() is x.untyped_storage() and self._last[1] == key:
            return self._last[2]
        flat = x.detach().flatten(0, -2)
        rows, weights = choose_rows(flat, self.share)
        kept = _Kept(rows, flat[rows].mul_(weights[:, None].to(x.dtype)))
        self._last = weakref.ref(x.untyped_storage()), key, kept
        return kept


class _Kept:
    """Positions `(rows,)`, and these rows times their weights `(rows, in)`."""

    def __init__(self, rows: torch.Tensor, values: torch.Tensor):
        self.rows, self.values = rows, values


class _SampledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, kept: _Kept) -> torch.Tensor:
        ctx.save_for_backward(weight, kept.rows, kept.values)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        (grad,), (weight, rows, values) = grads, ctx.saved_tensors
        back = grad @ weight if ctx.needs_input_grad[0] else None
        return back, grad.flatten(0, -2)[rows].T @ values, None
