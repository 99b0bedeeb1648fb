"""Chosen connections: some columns of each frozen matrix are trained, and of its inputs only those are kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class PartialConnections(nn.Module):
    """`y = x W^T` where the columns `columns` of `W` are the trained `weight` `(out, rank)`, and the rest is frozen.

    Nothing is added to the product. There are `rank * out` trained weights, which may be kept in more bits than `W` has: they are rounded
    into it when it runs. Of the inputs, `tokens * rank` numbers are kept for the backward pass instead of `tokens * in`. Columns are drawn
    at random, without repetition. Source: Woo et al. 2025, arXiv 2503.01905; differs in that trained columns are kept apart until the
    export, so that optimizers see a matrix of their own.
    """

    columns: torch.Tensor

    def __init__(self, base: nn.Module, out_features: int, in_features: int, rank: int, dtype: torch.dtype):
        super().__init__()
        self.base = base
        self.is_transposed = hasattr(base, "nf")
        rank = min(rank, in_features)
        self.weight = nn.Parameter(torch.empty(out_features, rank, dtype=dtype))
        self.register_buffer("columns", torch.empty(rank, dtype=torch.int64))
        if self.matrix.device.type != "meta":
            self.columns.copy_(torch.randperm(in_features)[:rank])
            with torch.no_grad():
                self.weight.copy_(self.matrix[:, self.columns])

    @property
    def matrix(self) -> torch.Tensor:
        """`W` `(out, in)` as it lies."""
        weight = self.base.get_parameter("weight").detach()
        return weight.T if self.is_transposed else weight

    def write_back(self) -> None:
        """Put the trained columns where they belong."""
        matrix = self.matrix
        matrix.index_copy_(1, self.columns, self.weight.detach().to(matrix.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.write_back()
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _PartialProduct.apply(x, self.weight, self)
        bias: Any = self.base.bias
        return y if bias is None else y + bias.to(y.dtype)


class _PartialProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, module: PartialConnections) -> torch.Tensor:
        ctx.module = module
        ctx.save_for_backward(x.index_select(-1, module.columns))
        return F.linear(x, module.matrix.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        (grad,) = grads
        (kept,) = ctx.saved_tensors
        trained = grad.flatten(0, -2).T @ kept.flatten(0, -2)  # (out, rank)
        back = grad @ ctx.module.matrix.to(grad.dtype) if ctx.needs_input_grad[0] else None
        return back, trained.to(ctx.module.weight.dtype), None


def connections_of(model: nn.Module) -> dict[str, PartialConnections]:
    """Name of the linear -> its trained connections."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PartialConnections)}


def release(model: nn.Module) -> None:
    """Give a model its own linears back, with the trained columns in them."""
    for name, module in connections_of(model).items():
        module.write_back()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module.base)
