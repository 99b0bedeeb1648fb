"""Updates during the backward pass: each weight steps as soon as its gradient is whole, so that gradients never exist together."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Protocol

import torch
from torch import nn

from haversack.errors import UsageError


class UpdatesOne(Protocol):
    """An optimizer that can update one weight: `ComposedOptimizer`, `Stepper`, `MasterWeights`."""

    def update(self, parameter: nn.Parameter) -> None: ...


class UpdateInBackward:
    """While it lasts, `loss.backward()` updates each of `parameters` by `optimizer` and drops its gradient.

    The peak holds the gradients of what one node of the backward pass gives at once, instead of all; the result is that of a step after
    the pass, to the bit, for a weight is updated when nothing that still runs needs it (torch would raise otherwise). Use as a context
    manager, or call `remove`. The norm of all gradients together is never known, so that they can't be clipped by it: `clip_tensor_norm`
    scales each tensor's gradient to a norm of at most that, which is another rule. Batches can't be accumulated. Source: Lv et al. 2023,
    arXiv 2306.09782, section 3.2; hooks after accumulation as in torch's tutorial "How to save memory by fusing the optimizer step into the
    backward pass".
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], optimizer: UpdatesOne, *, clip_tensor_norm: float | None = None
    ):
        if clip_tensor_norm is not None and not clip_tensor_norm > 0:
            raise UsageError(f"clip_tensor_norm is {clip_tensor_norm!r}, but must be above 0, or None.")
        self.optimizer = optimizer
        self.clip_tensor_norm = clip_tensor_norm
        self._handles = [parameter.register_post_accumulate_grad_hook(self._step) for parameter in parameters]

    def _step(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        if self.clip_tensor_norm is not None:
            norm = float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
            if norm > self.clip_tensor_norm:
                parameter.grad.mul_(self.clip_tensor_norm / norm)
        self.optimizer.update(parameter)
        parameter.grad = None

    def remove(self) -> None:
        """Give gradients back their ordinary life."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> UpdateInBackward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
