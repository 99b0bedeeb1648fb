"""A training step spread over processes by torch's fully sharded data parallel: each holds its rows of every weight and state.

Parameters are cut along their first axis; an optimizer of a rank sees its rows as ordinary tensors. Only rules whose numbers don't depend on each
other give the result of one process, so others are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from haversack.engine.recompute import decoder_layers
from haversack.errors import UsageError
from haversack.recipes.base import optimizer_option


class _Whole(nn.Module):
    """A model and whatever is computed from it, so that weights outside the layers are gathered for losses of any kind."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        return compute(*args)


def check_sharded_optimizer(name: str) -> None:
    """Raise UsageError for an optimizer that needs whole matrices, or whose codes depend on where a tensor is cut."""
    option = optimizer_option(name)
    if option.subspace is not None or option.state is not None or not option.rule.elementwise:
        raise UsageError(
            f"optimizer {name} works on whole matrices or blocks of them, but several ranks hold rows of each; choose adamw or sgdm."
        )


class Shards:
    """Shards `model` over a mesh of one axis, layer by layer; what is left (embeddings, head, norms) together."""

    def __init__(self, model: Any, mesh: DeviceMesh):
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh)
        self.whole = _Whole(model)
        fully_shard(self.whole, mesh=mesh)
        self._units = [module for module in self.whole.modules() if isinstance(module, FSDPModule)]
        for unit in self._units:  # losses are shares of the whole step's, so that gradients are summed
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)
        self._own: dict[int, nn.Parameter] = {}
        for parameter in model.parameters():
            local = parameter.detach().to_local()
            self._own[id(parameter)] = nn.Parameter(local, requires_grad=parameter.requires_grad)

    def run(self, compute: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        """`compute(*args)` with the weights there as it comes to them."""
        found = self.whole(compute, *args)
        if not torch.is_grad_enabled():  # without a backward pass, what lies outside the layers would stay whole
            for unit in self._units:
                unit.reshard()
        return found

    def own(self, parameter: nn.Parameter) -> nn.Parameter:
        """This rank's rows of a parameter, on the same storage."""
        return self._own[id(parameter)]

    def rows(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Which rows of the whole parameter these are."""
        each = -(-parameter.shape[0] // self.size)
        start = min(self.rank * each, parameter.shape[0])
        return start, start + len(self.own(parameter))

    def take_gradients(self, trained: list[nn.Parameter]) -> None:
        """Hand each rank's rows of the gradients to its rows of the weights."""
        for parameter in trained:
            if isinstance(parameter.grad, DTensor):
                self.own(parameter).grad = parameter.grad.to_local()
                parameter.grad = None

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's values, in place."""
        dist.all_reduce(values)
        return values

    def gather(self) -> dict[str, torch.Tensor]:
        """Make every weight whole on every rank, for good; what a model's state dict holds, by name."""
        for unit in self._units:
            unit.unshard()
        model = self.whole.model
        state = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
        for prefix, module in model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    state[f"{prefix}.{name}".lstrip(".")] = buffer
        return state
