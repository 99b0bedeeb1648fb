"""Layouts against tensors: any chain of the operations that conversions use leaves each number where torch puts it."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haversack.describe.layout import Layout, UnlocatableError


def materialize(layout: Layout, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor that a layout describes; -1 where no block covers it. Fails on a double cover."""
    result = torch.full(layout.shape, -1)
    for block in layout.blocks:
        region = tensors[block.tensor][tuple(slice(*r) for r in block.region())]
        shown = [axis for axis in block.axes if axis is not None]
        values = region.permute(*shown, *(i for i in range(region.ndim) if i not in shown)).reshape(block.shape)
        box = tuple(slice(a, a + n) for a, n in zip(block.at, block.shape, strict=True))
        assert (result[box] == -1).all()
        result[box] = values
    return result


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_chain_of_operations_agrees_with_torch(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    count = data.draw(st.integers(1, 3))
    tensors = {f"t{i}": torch.arange(prod(shape)).reshape(shape) + 1000 * i for i in range(count)}
    values, layouts = list(tensors.values()), [Layout.whole(name, shape) for name in tensors]
    join = torch.cat if data.draw(st.booleans()) else torch.stack
    axis = data.draw(st.integers(0, len(shape) - 1))
    value, layout = join(values, dim=axis), join(layouts, dim=axis)
    for _ in range(data.draw(st.integers(0, 4))):
        axis = data.draw(st.integers(0, value.ndim - 1))
        operation = data.draw(st.sampled_from(["chunk", "split", "transpose", "narrow", "rejoin", "unbind"]))
        if operation == "chunk" and value.shape[axis]:
            parts = data.draw(st.integers(1, 3))
            value, layout = torch.chunk(value, parts, dim=axis)[-1], torch.chunk(layout, parts, dim=axis)[-1]
        elif operation == "split":
            first = data.draw(st.integers(0, value.shape[axis]))
            sizes = [first, value.shape[axis] - first]
            value, layout = torch.split(value, sizes, dim=axis)[1], torch.split(layout, sizes, dim=axis)[1]
        elif operation == "transpose":
            other = data.draw(st.integers(0, value.ndim - 1))
            value, layout = torch.transpose(value, axis, other), torch.transpose(layout, axis, other)
        elif operation == "narrow":
            start = data.draw(st.integers(0, value.shape[axis]))
            stop, step = data.draw(st.integers(start, value.shape[axis])), data.draw(st.integers(1, 3))
            cut = [slice(None)] * value.ndim
            cut[axis] = slice(start, stop, step)
            value, layout = value[tuple(cut)], layout.narrow(axis, start, stop, step)
        elif operation == "rejoin":  # the same numbers twice
            value, layout = torch.cat([value, value[:0], value]), torch.cat([layout, layout.narrow(0, 0, 0), layout])
        elif value.ndim > 1 and value.shape[0]:
            value, layout = value.unbind()[-1], layout.unbind()[-1]
        assert layout.shape == tuple(value.shape)
    assert torch.equal(materialize(layout, tensors), value)


def test_what_computes_or_reshapes_is_refused():
    layout = Layout.whole("t", (4, 6))
    for operation in (lambda: torch.add(layout, layout), lambda: layout.view(2, 2, 6), lambda: layout.reshape(24)):
        with pytest.raises(UnlocatableError):
            operation()


def test_columns_from_two_tensors_are_no_rows():
    both = torch.cat([Layout.whole("a", (4, 3)), Layout.whole("b", (4, 3))], dim=1)
    with pytest.raises(UnlocatableError, match="columns"):
        both.as_matrix_pieces()


def test_unbind_is_linear_in_experts():
    stack = torch.stack([Layout.whole(f"e{i}", (4, 6)) for i in range(2000)])
    assert [layout.blocks[0].tensor for layout in stack.unbind()][-1] == "e1999"
    assert sum(len(layout.blocks) for layout in stack.unbind()) == 2000
