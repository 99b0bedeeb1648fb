"""What an update by the optimizer holds for a moment, traced one kind of tensor at a time on tensors without memory.

Optimizers update one tensor after another, so that equal tensors are traced once. Rules whose numbers don't depend on each other
walk a tensor in pieces, thousands of operations on a wide matrix: they are traced at two short lengths, where what a piece
takes is highest, and at two longer ones, where what is made of the whole tensor is, and go on along the higher of the two lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from haversack.describe.checkpoint import torch_dtype
from haversack.engine.optimizers import Stepper
from haversack.engine.trace import OwnedBytes
from haversack.engine.true_values import TrueValues
from haversack.parts.optimizer.base import OptimizerOption

MakeStepper = Callable[[Sequence[nn.Parameter], Sequence[nn.Parameter]], Stepper]
"""An optimizer over the first parameters, of which the second are matrices inside the layers."""

SHORT_SHAPES = ((256, 1024), (512, 1024))
"""Two and four pieces of the rules that walk in pieces."""

LONG_SHAPES = ((2048, 1024), (4096, 1024))
"""Sixteen and thirty-two."""


@dataclass(frozen=True)
class TrainedTensor:
    """One trained tensor: its shape, its dtype by safetensors' name, and whether it is a matrix inside the layers."""

    shape: tuple[int, ...]
    dtype: str
    is_matrix: bool


@dataclass(frozen=True)
class TensorUpdate:
    """One tensor's update: the most that it holds over its start, and what its end holds over its start (a gradient that
    is dropped counts below zero)."""

    rise_bytes: int
    change_bytes: int


def trace_updates(make: MakeStepper, option: OptimizerOption, tensors: Sequence[TrainedTensor]) -> int:
    """The most that one step over `tensors` holds beside weights, gradients and states, of a step that is not the first.

    `make` builds an optimizer of `option`. Takes about 0.2 s for tensors of any size.
    """
    lines: dict[tuple[str, bool, int], list[TensorUpdate]] = {}
    updates: dict[TrainedTensor, TensorUpdate] = {}
    drops = make([nn.Parameter(torch.empty(1))], []).drops_gradients
    held = most = 0
    for tensor in tensors:
        if tensor not in updates:
            updates[tensor] = _trace_update(make, option, tensor, lines)
        most = max(most, held + updates[tensor].rise_bytes)
        held += updates[tensor].change_bytes if drops else 0
    return most


def _trace_update(
    make: MakeStepper,
    option: OptimizerOption,
    tensor: TrainedTensor,
    lines: dict[tuple[str, bool, int], list[TensorUpdate]],
) -> TensorUpdate:
    own = option.at(tensor.shape, inner=tensor.is_matrix)
    num_elements = prod(tensor.shape)
    by_element = own.subspace is None and own.rule.elementwise
    if not by_element or num_elements <= prod(SHORT_SHAPES[1]):
        return run_update(make, tensor, by_element=by_element)
    kind = (tensor.dtype, tensor.is_matrix, len(tensor.shape))
    traced = (*SHORT_SHAPES, *LONG_SHAPES)
    if kind not in lines:
        shapes = traced if len(tensor.shape) > 1 else [(prod(shape),) for shape in traced]
        lines[kind] = [run_update(make, replace(tensor, shape=shape), by_element=True) for shape in shapes]
    sizes = [prod(shape) for shape in traced]
    rises = [update.rise_bytes for update in lines[kind]]
    changes = [update.change_bytes for update in lines[kind]]
    rise = max(_on_line(num_elements, sizes[k : k + 2], rises[k : k + 2]) for k in (0, 2))
    return TensorUpdate(rise, _on_line(num_elements, sizes[:2], changes[:2]))


def _on_line(at: int, sizes: Sequence[int], values: Sequence[int]) -> int:
    """The line through two points, elsewhere."""
    (x, further), (y, above) = sizes, values
    return y + round((at - x) / (further - x) * (above - y))


def run_update(make: MakeStepper, tensor: TrainedTensor, *, by_element: bool = False) -> TensorUpdate:
    """One tensor's second update, traced whole. A rule `by_element` has no operation that differs by device: it is traced on meta, in a
    tenth of the time."""
    live = OwnedBytes()
    device = "meta" if by_element else "cpu"
    with nullcontext() if by_element else FakeTensorMode(), TrueValues(), live:
        parameter = nn.Parameter(torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype), device=device))
        stepper = make([parameter], [parameter] if tensor.is_matrix else [])
        for _ in range(2):  # states are made by the first
            parameter.grad = torch.empty_like(parameter)
            live.cut("gradient")
            stepper.step()
            live.cut("update")
    update = live.segments[-1]
    return TensorUpdate(update.rise_bytes, sum(update.end.values()) - sum(update.start.values()))
