"""Zeroth order: small weights are tuned from two forward passes with noise that comes back from its seed; nothing is kept for a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from haversack.engine.recompute import decoder_layers
from haversack.errors import UsageError
from haversack.parts.optimizer.base import PIECE_ELEMENTS


class ZerothOrder:
    """Tunes the linears of a transformers model's decoder layers by losses alone; usable in anybody's loop: `step(lambda: model(...).loss)`.

    The loss is asked with the weights moved by `eps` times normal noise, forth and back; what it rises by is the gradient along the noise, and weights step by `lr` times that against it. Of each matrix the `share`
    of smallest magnitude moves (1: all, as in MeZO). Memory is that of a forward pass without gradients, one linear's weights (moved while it runs, and put back to the bit), and a number per matrix. The noise is
    drawn by `seed` and step, `PIECE_ELEMENTS` at a time; whoever resumes gives `done`. Sources: Malladi et al. 2023, arXiv 2305.17333, algorithm 1; Liu et al. 2024, arXiv 2402.15751, section 3 (catalogue: sparse-mezo), whose
    thresholds are set once as here. Raises UsageError for settings that are none.
    """

    def __init__(
        self, model: Any, *, lr: float = 1e-6, eps: float = 1e-3, share: float = 0.25, seed: int = 0, done: int = 0
    ):
        if not (lr > 0 and eps > 0 and 0 < share <= 1):
            raise UsageError(f"lr {lr!r}, eps {eps!r} and share {share!r} must be above 0, and share at most 1.")
        self.lr, self.eps, self.seed, self.done = lr, eps, seed, done
        layers = decoder_layers(model)
        self._linears = [module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)]
        self.thresholds = [_threshold(linear.weight, share) for linear in self._linears]

    @torch.no_grad()
    def step(self, loss_of: Callable[[], torch.Tensor]) -> float:
        """One step; the mean of the two losses."""
        ahead, behind = (self._loss(loss_of, sign * self.eps) for sign in (1.0, -1.0))
        slope = (ahead - behind) / (2 * self.eps)
        for number, linear in enumerate(self._linears):
            self._move(number, linear.weight, -self.lr * slope)
        self.done += 1
        return (ahead + behind) / 2

    def _loss(self, loss_of: Callable[[], torch.Tensor], distance: float) -> float:
        """With every linear's weights moved while it runs."""
        originals: dict[int, torch.Tensor] = {}

        def before(number: int, linear: nn.Linear) -> None:
            originals[number] = linear.weight.detach().clone()
            self._move(number, linear.weight, distance)

        def after(number: int, linear: nn.Linear) -> None:
            linear.weight.copy_(originals.pop(number))

        handles: list[Any] = []
        for number, linear in enumerate(self._linears):
            handles.append(linear.register_forward_pre_hook(lambda module, _, n=number: before(n, module)))
            handles.append(
                linear.register_forward_hook(lambda module, _, __, n=number: after(n, module), always_call=True)
            )
        try:
            return float(loss_of())
        finally:
            for handle in handles:
                handle.remove()

    def _move(self, number: int, weight: torch.Tensor, distance: float) -> None:
        """Add `distance` times this step's noise to the weights below their threshold."""
        generator = torch.Generator().manual_seed((self.seed + self.done) * 2**20 + number)
        for piece in _pieces(weight):
            noise = torch.randn(piece.shape, generator=generator).to(weight.device)
            noise.mul_(piece.abs() <= self.thresholds[number])
            piece.add_(noise.mul_(distance).to(piece.dtype))


def _pieces(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Whole rows of at most `PIECE_ELEMENTS` numbers, or one."""
    return iter(weight.detach().split(max(1, PIECE_ELEMENTS // weight.shape[1])))


def _threshold(weight: torch.Tensor, share: float) -> float:
    """The magnitude that this share of a matrix does not exceed, from at most `PIECE_ELEMENTS` of its numbers, evenly spread."""
    if share == 1:
        return float("inf")
    magnitudes = weight.detach().flatten()[:: max(1, weight.numel() // PIECE_ELEMENTS)].float().abs()
    return float(magnitudes.kthvalue(max(1, round(share * len(magnitudes)))).values)
