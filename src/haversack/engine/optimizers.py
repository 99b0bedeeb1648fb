"""Optimizers by name, the steps that they take together, and master weights around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch import nn

from haversack.engine.composed_optimizer import ComposedOptimizer
from haversack.recipes.base import optimizer_option

NOT_INNER = ("embedding", "head", "position")
"""Roles of matrices that keep whole states under AdamW, as vectors do: their rows are looked up, or they are the head."""


def make_optimizer(
    name: str,
    parameters: Sequence[nn.Parameter],
    matrices: Iterable[nn.Parameter] = (),
    *,
    lr: float | None = None,
    seed: int = 0,
) -> Stepper:
    """The optimizer `name` (a recipe's id) over `parameters`; `matrices` are those inside the layers. `lr` replaces its own
    learning rate. Raises UsageError for an unknown name, with all there are."""
    return Stepper([ComposedOptimizer(parameters, optimizer_option(name), matrices=matrices, lr=lr, seed=seed)])


class Stepper:
    """Optimizers that step together."""

    drops_gradients: ClassVar[bool] = False
    """Whether a step drops each gradient when it was used, and not all of them at its end."""

    def __init__(self, optimizers: Sequence[ComposedOptimizer]):
        self.optimizers = list(optimizers)

    def step(self) -> None:
        """Update the weights; gradients are dropped."""
        for optimizer in self.optimizers:
            optimizer.step()
        self.zero_grad()

    def update(self, parameter: nn.Parameter) -> None:
        """Update one weight that has a gradient, which is dropped."""
        for optimizer in self.optimizers:
            if optimizer.holds(parameter):
                optimizer.update(parameter)
        parameter.grad = None

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> list[torch.Tensor]:
        """Everything kept from step to step."""
        kept: list[torch.Tensor] = []
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                kept += [value for value in state.values() if isinstance(value, torch.Tensor)]
            kept += [table for tables in optimizer.shared.values() for table in tables.values()]
        return kept


class MasterWeights(Stepper):
    """Weights and gradients in 16 bits, a float32 copy that the optimizer updates, and its state in float32.

    `make` builds the optimizer of the copies, which come in the order of `parameters`. One tensor at a time: its gradient is
    widened, its copy updated and rounded back, so that wide gradients never exist together. Costs 4 bytes per weight. Source:
    Micikevicius et al. 2018, arXiv 1710.03740, section 3.1.
    """

    drops_gradients = True

    def __init__(self, parameters: Sequence[nn.Parameter], make: Callable[[Sequence[nn.Parameter]], Stepper]):
        self.pairs = [(parameter, nn.Parameter(parameter.detach().float())) for parameter in parameters]
        self._masters = {id(parameter): master for parameter, master in self.pairs}
        self.inner = make(self.masters)
        super().__init__(self.inner.optimizers)

    def step(self) -> None:
        for parameter, _ in self.pairs:
            if parameter.grad is not None:
                self.update(parameter)

    def update(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        master = self._masters[id(parameter)]
        master.grad = parameter.grad.float()
        parameter.grad = None
        self.inner.update(master)
        with torch.no_grad():
            parameter.copy_(master)

    def zero_grad(self) -> None:
        for parameter, master in self.pairs:
            parameter.grad = master.grad = None

    @property
    def masters(self) -> list[nn.Parameter]:
        return [master for _, master in self.pairs]
