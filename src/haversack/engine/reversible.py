"""Reversible layers: each layer's input is found again from what came out of all of them, so that none is kept, however many layers there are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from haversack.engine.recompute import decoder_layers, has_dropout
from haversack.engine.rerouted import Rerouted
from haversack.errors import UnsupportedModelError, UsageError

LEAST_MOMENTUM = 1 / 8
"""Below it outputs hardly come nearer to the model's own."""

LOST_BITS = 32
"""Of the 53 that streams have: going back through a layer loses `-log2(momentum)` of them, and 21 must remain."""


def momentum_of(num_layers: int) -> float:
    """How much of a layer's change the next one repeats: the least for which all layers together lose `LOST_BITS`."""
    return max(LEAST_MOMENTUM, 2 ** (-LOST_BITS / num_layers))


class ReversibleLayers(Rerouted):
    """While it lasts, a transformers model in training runs its decoder layers so that their inputs can be found again; usable in anybody's loop.

    With `f(x) = layer(x) - x` of the model's own layer (and whatever adapters are in it), two streams go from layer to layer: `v' = m v + (1 - m) f(x)` and `x' = x + v'`, `m` the momentum; so `x = x' - v'` and `v = (v' - (1 - m) f(x)) / m`. What `v` still
    holds behind the last layer is given to `x`, so that every layer's change counts once and outputs begin near the model's own: they are the model's at `m = 0`. Kept for the backward pass are the two
    last streams alone, in 64 bits: 16 bytes per number of one hidden state, whatever the depth. Going back costs a forward pass more, as recomputation does. Error: going back loses some `m^-layers`
    roundings in 64 bits; of sixteen layers' inputs, 99% came back to the bit in 16 bits, in 32 bits all to 2 thousandths of the largest (measured). Gradients are those of the coupled model. Without gradients and in evaluation layers run as they are. As a context manager it gives the model back as it was; otherwise it lasts until
    `remove`. Sources: Liao et al. 2023, arXiv 2306.00477 (a pre-trained model with adapters made reversible near its starting point); Sander et al. 2021, arXiv 2102.07870, equation 2 (this coupling); differs from
    the first in the coupling, whose factors there act on the streams and not on their changes. Raises UsageError where activations are dropped at random; UnsupportedModelError where something is done between layers.
    """

    def __init__(self, model: Any, momentum: float | None = None):
        layers = decoder_layers(model)
        self.momentum = momentum_of(len(layers)) if momentum is None else momentum
        if not 0 < self.momentum < 1:
            raise UsageError(f"the momentum is {momentum!r}, but must lie above 0 and below 1.")
        if has_dropout(model.config):
            raise UsageError(
                "layers that are run backwards can't drop activations at random; set the config's dropout to 0."
            )
        self.x = self.v = torch.empty(0)
        """The streams behind the layer that ran last: float64."""
        self._shown: torch.Tensor | None = None
        self._change: torch.Tensor | None = None
        self._last = len(layers) - 1
        super().__init__(
            {
                layer: partial(self._forward, position, layer, layer.forward)
                for position, layer in enumerate(layers)
                if isinstance(layer, GradientCheckpointingLayer)  # a trace leaves some out
            }
        )

    def remove(self) -> None:
        super().remove()
        self.forget()

    def _forward(
        self, position: int, layer: Any, run: Callable[..., Any], hidden: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if not layer.training or not torch.is_grad_enabled():
            return run(hidden, *args, **kwargs)
        if position == 0:
            self.x, self.v = (
                hidden.detach().double(),
                torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device),
            )
            change = torch.zeros_like(hidden).requires_grad_()  # so that there is a backward pass, whatever is frozen
        else:
            if hidden is not self._shown or self._change is None:
                raise UnsupportedModelError(
                    "the model changes hidden states between its layers, so that they can't be run backwards; choose recompute full."
                )
            change = self._change
        again = partial(_states, run, args, kwargs)
        self._shown, self._change = _Coupled.apply(hidden, change, self, again, position == 0)
        if position == self._last:
            rest = self.momentum / (1 - self.momentum)
            found, self._shown, self._change = self._shown + rest * self._change, None, None
            return found
        return self._shown

    def forget(self) -> None:
        """Drop the streams."""
        self.x = self.v = torch.empty(0)
        self._shown = self._change = None


def _states(run: Callable[..., Any], args: Any, kwargs: Any, hidden: torch.Tensor) -> torch.Tensor:
    output = run(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


class _Coupled(torch.autograd.Function):
    """Hidden states and the last layer's change to the next ones, beside the streams in 64 bits that they are roundings of."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        change: torch.Tensor,
        streams: ReversibleLayers,
        run: Callable[[torch.Tensor], torch.Tensor],
        is_first: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.streams, ctx.run, ctx.dtype, ctx.is_first = streams, run, hidden.dtype, is_first
        m = streams.momentum
        f = run(hidden).double().sub_(hidden)
        streams.v = streams.v.mul(m).add_(f, alpha=1 - m)
        streams.x = streams.x + streams.v
        return streams.x.to(hidden.dtype), streams.v.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        of_next, of_change = grads
        streams: ReversibleLayers = ctx.streams
        m = streams.momentum
        streams.x = streams.x - streams.v
        hidden = streams.x.to(ctx.dtype).requires_grad_()
        with torch.enable_grad():
            output = ctx.run(hidden)
        f = output.detach().double().sub_(hidden.detach())
        streams.v = streams.v.sub(f, alpha=1 - m).div_(m)
        if ctx.is_first:
            streams.forget()
        whole = of_next + of_change  # of v'
        torch.autograd.backward(output, whole * (1 - m))
        assert hidden.grad is not None
        return of_next.add(hidden.grad).sub_(whole, alpha=1 - m), whole.mul_(m), None, None, None
