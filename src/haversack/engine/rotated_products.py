"""Products in 8-bit integers, forwards and backwards: both factors are rotated first, so that no outlier takes the others' bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from haversack.codecs.hadamard import block_columns, hadamard_transform
from haversack.engine.recompute import decoder_layers
from haversack.engine.rerouted import Rerouted
from haversack.errors import UsageError

LARGEST = 127
"""Of the integers."""

CUDA_MULTIPLE, CUDA_ROWS = 8, 16
"""What torch's product of integers asks of sizes on a GPU: multiples of it, and more rows than that."""


def multiplies_integers(device: torch.device) -> bool:
    """Whether the hardware has a product of 8-bit integers that is faster than that of floats: tensor cores, or VNNI on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 5)
    return device.type == "cpu" and torch.cpu._is_vnni_supported()


def integer_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """int8 `(m, k)` times int8 `(n, k)` transposed, as float32 `(m, n)`: summed in int32, or, on a GPU whose sizes don't suit, in float32."""
    if a.device.type == "cuda" and (len(a) <= CUDA_ROWS or any(n % CUDA_MULTIPLE for n in (*a.shape, len(b)))):
        return a.float() @ b.T.float()
    return torch._int_mm(a, b.T).float()


class Rotated:
    """Rows `(n, k)` times a Hadamard matrix (in blocks of the largest power of two that divides k), as int8 codes `(n, k)` with a scale per row `(n, 1)`.

    Without `rotate`, the rows as they are. Error: half a step, of a row's largest number over 127."""

    def __init__(self, rows: torch.Tensor, *, rotate: bool = True):
        turned = hadamard_transform(rows, block_columns(rows.shape[1])) if rotate else rows.float()
        self.scales = turned.abs().amax(1, keepdim=True).div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        self.codes = (turned / self.scales).round_().to(torch.int8)

    def times(self, other: Rotated) -> torch.Tensor:
        """The product with other rows, `(n, k) (m, k)^T`: rotations cancel. Float32 `(n, m)`."""
        return integer_product(self.codes, other.codes).mul_(self.scales).mul_(other.scales.T)


class RotatedProducts(Rerouted):
    """While it lasts, linears of a transformers model's decoder layers multiply 8-bit integers in all three products: outputs, gradients of inputs and of weights; usable in anybody's loop.

    Both factors of each are rotated along what is summed over (inputs, outputs, tokens) by a Hadamard matrix, which cancels in the product, and rounded row by row. Of the inputs, the rotated codes are kept for the backward pass: a byte per number and 4 per token, where linears with the
    same input keep it each. `emulated` says that this hardware has no fast product of integers, so that only the rounding is as it would be. As a context manager it gives the model back as it was; otherwise it lasts until `remove`. Source: Ashkboos et al. 2025, arXiv 2501.02625, section 4 (all
    three products, rotated on both sides); differs in that scales are per row and matrices rotated in blocks, and in that ranks speak to each other in 16 bits. Raises UsageError where layers have no linears.
    """

    def __init__(self, model: Any, *, rotate: bool = True):
        linears = [m for layer in decoder_layers(model) for m in layer.modules() if isinstance(m, nn.Linear)]
        if not linears:
            raise UsageError(
                "products of rotated integers are of linears, but the layers have none; choose another precision."
            )
        self.emulated = not multiplies_integers(linears[0].weight.device)
        super().__init__({linear: partial(_forward, linear, rotate) for linear in linears})


def _forward(linear: nn.Linear, rotate: bool, x: torch.Tensor) -> torch.Tensor:
    y = RotatedProduct.apply(x, linear.weight, rotate)
    return y if linear.bias is None else y + linear.bias.to(y.dtype)


class RotatedProduct(torch.autograd.Function):
    """`x W^T` of `(..., in)` and `(out, in)` by integers."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, rotate: bool) -> torch.Tensor:
        inputs = Rotated(x.flatten(0, -2), rotate=rotate)
        ctx.rotate, ctx.shape = rotate, x.shape
        kept = (inputs.codes, inputs.scales) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(weight, *kept)
        y = inputs.times(Rotated(weight, rotate=rotate))
        return y.to(x.dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (grad,), (weight, *kept) = grads, ctx.saved_tensors
        flat = grad.flatten(0, -2)
        back = trained = None
        if ctx.needs_input_grad[0]:
            back = Rotated(flat, rotate=ctx.rotate).times(Rotated(weight.T, rotate=ctx.rotate))
            back = back.to(grad.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            codes, scales = kept
            inputs = codes.float().mul_(scales)  # rotated along the inputs, as the product will be
            trained = Rotated(flat.T, rotate=ctx.rotate).times(Rotated(inputs.T, rotate=ctx.rotate))
            if ctx.rotate:
                trained = hadamard_transform(trained, block_columns(trained.shape[1]))
            trained = trained.to(weight.dtype)
        return back, trained, None
