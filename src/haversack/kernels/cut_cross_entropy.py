"""Cross entropy of a linear head by blocks of logits, both ways, in torch's own products: any device, any float dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from haversack.errors import UsageError
from haversack.kernels.pieces import piece_starts


def cut_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    blocks: tuple[int, int],
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Each token's negative log-likelihood, float32 `(tokens,)`, in nats; what `CutCrossEntropy` says of it holds.

    `hidden` `(tokens, hidden_size)`, `weight` `(vocab_size, hidden_size)`, `labels` `(tokens,)`, all of them counted; `blocks`
    are tokens and rows of the vocabulary at a time. Under autocast products are in its dtype, a block of the matrix cast at a
    time. Raises UsageError for a label outside the vocabulary.
    """
    if len(labels) and (int(labels.max()) >= len(weight) or int(labels.min()) < 0):
        raise UsageError(
            f"labels lie from {int(labels.min())} to {int(labels.max())}, but the vocabulary has {len(weight)} entries from 0 on."
        )
    return _CutLosses.apply(hidden, weight, bias, labels, blocks, scale, softcap)


class _CutLosses(torch.autograd.Function):
    """Kept for the backward pass: the inputs, and one number per token."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        blocks: tuple[int, int],
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        compute = _compute_dtype(hidden)
        states = hidden.to(compute)
        num_tokens, vocab_size = len(hidden), len(weight)
        tokens, rows = blocks
        top = torch.full((num_tokens,), -torch.inf, device=hidden.device)
        total = torch.zeros(num_tokens, device=hidden.device)
        target = torch.zeros(num_tokens, device=hidden.device)
        buffer = _Buffer(tokens * rows, compute, hidden.device)
        for row in piece_starts(vocab_size, rows, hidden):
            vocabulary = slice(row, min(row + rows, vocab_size))
            part, shift = weight[vocabulary].to(compute), None if bias is None else bias[vocabulary]
            for token in piece_starts(num_tokens, tokens, hidden):
                some = slice(token, min(token + tokens, num_tokens))
                logits = _shape(buffer.logits(states[some], part, shift), scale, softcap)
                _add_targets(target[some], logits, labels[some], row)
                highest = torch.maximum(top[some], logits.amax(1))
                sums = logits.sub_(highest[:, None]).exp_().sum(1)
                total[some] = total[some] * (top[some] - highest).exp_() + sums
                top[some] = highest
        log_sum = top.add_(total.log_())
        ctx.save_for_backward(hidden, weight, bias, labels, log_sum)
        ctx.compute = compute  # autocast is off in the backward pass
        ctx.blocks, ctx.scale, ctx.softcap = blocks, scale, softcap
        return log_sum - target

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, labels, log_sum = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        compute = ctx.compute
        states = hidden.to(compute)
        num_tokens, vocab_size = len(hidden), len(weight)
        tokens, rows = ctx.blocks
        buffer = _Buffer(tokens * rows, compute, hidden.device)
        to_hidden = torch.zeros(hidden.shape, device=hidden.device) if wants_hidden else None
        make = torch.empty_like if num_tokens else torch.zeros_like  # without tokens nothing is written
        to_weight = make(weight) if wants_weight else None
        to_bias = torch.zeros(vocab_size, device=hidden.device) if wants_bias else None
        for row in piece_starts(vocab_size, rows, hidden):
            vocabulary = slice(row, min(row + rows, vocab_size))
            part, shift = weight[vocabulary].to(compute), None if bias is None else bias[vocabulary]
            whole = num_tokens <= tokens
            sums = None if whole or not wants_weight else torch.zeros(part.shape, device=hidden.device)
            for token in piece_starts(num_tokens, tokens, hidden):
                some = slice(token, min(token + tokens, num_tokens))
                product = buffer.logits(states[some], part, shift)
                steps = _gradient(product, log_sum[some], labels[some], grad[some], row, ctx.scale, ctx.softcap)
                if to_bias is not None:
                    to_bias[vocabulary] += steps.sum(0)
                steps = buffer.narrow(steps)
                if to_hidden is not None:
                    _add_product(to_hidden[some], steps, part)
                if to_weight is not None and sums is None:
                    to_weight[vocabulary] = steps.T @ states[some]
                elif sums is not None:
                    _add_product(sums, steps.T, states[some])
            if sums is not None:
                assert to_weight is not None
                to_weight[vocabulary] = sums
        return (
            None if to_hidden is None else to_hidden.to(hidden.dtype),
            to_weight,
            None if to_bias is None else to_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


class _Buffer:
    """Room for one block of logits, in the products' dtype and in float32."""

    def __init__(self, elements: int, compute: torch.dtype, device: torch.device):
        self.product = torch.empty(elements, dtype=compute, device=device)
        self.wide = self.product if compute == torch.float32 else torch.empty(elements, device=device)

    def logits(self, states: torch.Tensor, part: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The head's product of a block, `(tokens, rows)` float32; the next call writes over it."""
        shape = (len(states), len(part))
        product = self.product[: shape[0] * shape[1]].view(shape)
        torch.mm(states, part.T, out=product)
        logits = product
        if self.wide is not self.product:
            logits = self.wide[: shape[0] * shape[1]].view(shape).copy_(product)
        return logits if bias is None else logits.add_(bias)

    def narrow(self, steps: torch.Tensor) -> torch.Tensor:
        """A block's gradients in the products' dtype."""
        if self.wide is self.product:
            return steps
        return self.product[: steps.numel()].view(steps.shape).copy_(steps)


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of products: autocast's where it is on."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def _shape(product: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """Logits of the head's product, in place."""
    if softcap is not None:
        return product.mul_(scale / softcap).tanh_().mul_(softcap)
    return product.mul_(scale) if scale != 1 else product


def _gradient(
    product: torch.Tensor,
    log_sum: torch.Tensor,
    labels: torch.Tensor,
    grad: torch.Tensor,
    row: int,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Gradients by the head's product, in its place: softmax less the labels, times each token's own, through the softcap."""
    logits = _shape(product, scale, softcap)
    slope = None if softcap is None else (logits / softcap).square_().neg_().add_(1)
    steps = logits.sub_(log_sum[:, None]).exp_().mul_(grad[:, None])
    inside, column = _columns(labels, row, product.shape[1])
    steps.scatter_add_(1, column, torch.where(inside, -grad, 0)[:, None])
    if slope is not None:
        steps.mul_(slope)
    return steps.mul_(scale) if scale != 1 else steps


def _add_targets(target: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, row: int) -> None:
    """Note the logits of labels that lie in the block which begins at `row`."""
    inside, column = _columns(labels, row, logits.shape[1])
    target += torch.where(inside, logits.gather(1, column)[:, 0], 0)


def _columns(labels: torch.Tensor, row: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether labels lie in a block of the vocabulary, and their columns there `(tokens, 1)` (any for the others)."""
    column = labels - row
    inside = (column >= 0) & (column < rows)
    return inside, column.clamp_(0, rows - 1)[:, None]


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add `a @ b` to a float32 sum."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
