"""Where every number of a parameter lies in the checkpoint, found by running transformers' own conversions.

A `Layout` stands in for a tensor: it has a shape and knows, block by block, which region of which checkpoint tensor its
numbers come from. It answers the few torch functions that conversions use (stack, cat, chunk, split, transpose), so
that the conversion code of transformers itself runs on it and leaves a layout where it would leave a tensor. A
conversion that computes, or that reshapes, raises `UnlocatableError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from haversack.describe.site import TensorSlice


class UnlocatableError(Exception):
    """The numbers are not a plain rearrangement of the checkpoint's (internal: callers name the parameter)."""


class Block(NamedTuple):
    """A box of a layout that is one strided region of one checkpoint tensor. A named tuple: experts make 100,000.

    `at` and `shape` are the box, per layout axis. `axes[i]` is the tensor's axis behind layout axis i, or None for an
    axis of length one that a stack added. The region starts at `start` with `step`, per axis of the tensor; an axis
    that is behind no layout axis is fixed at its start.
    """

    tensor: str
    source_shape: tuple[int, ...]
    at: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[int | None, ...]
    start: tuple[int, ...]
    step: tuple[int, ...]

    def region(self) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, step) per axis of the tensor."""
        lengths = [1] * len(self.start)
        for axis, length in zip(self.axes, self.shape, strict=True):
            if axis is not None:
                lengths[axis] = length
        return tuple(
            (a, a + (n - 1) * s + 1 if n else a, s) for a, n, s in zip(self.start, lengths, self.step, strict=True)
        )


@dataclass(frozen=True)
class Layout:
    """A tensor described by where it comes from; blocks cover it exactly once."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @classmethod
    def whole(cls, tensor: str, shape: Sequence[int]) -> Layout:
        shape = tuple(shape)
        n = len(shape)
        return cls(shape, (Block(tensor, shape, (0,) * n, shape, tuple(range(n)), (0,) * n, (1,) * n),))

    # What conversions ask of a tensor.
    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> Layout:
        return self

    def narrow(self, axis: int, start: int, stop: int, step: int = 1) -> Layout:
        """`layout[start:stop:step]` along one axis."""
        axis %= self.ndim
        if (start, stop, step) == (0, self.shape[axis], 1):
            return self
        blocks = []
        for block in self.blocks:
            first, length = block.at[axis], block.shape[axis]
            index = max(0, -(-(first - start) // step))  # the first kept position inside the block
            position = start + index * step
            end = min(stop, first + length)
            if position >= end:
                continue
            count = -(-(end - position) // step)
            source_axis = block.axes[axis]
            source_start, source_step = block.start, block.step
            if source_axis is not None:
                source_start = _with(
                    source_start,
                    source_axis,
                    source_start[source_axis] + (position - first) * source_step[source_axis],
                )
                source_step = _with(source_step, source_axis, source_step[source_axis] * (step if count > 1 else 1))
            box = _with(block.at, axis, index), _with(block.shape, axis, count)
            blocks.append(Block(block.tensor, block.source_shape, *box, block.axes, source_start, source_step))
        length = max(0, -(-(min(stop, self.shape[axis]) - start) // step))
        return Layout(_with(self.shape, axis, length), tuple(blocks))

    def transpose(self, dim0: int, dim1: int) -> Layout:
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        blocks = tuple(
            b._replace(
                at=tuple(b.at[i] for i in order),
                shape=tuple(b.shape[i] for i in order),
                axes=tuple(b.axes[i] for i in order),
            )
            for b in self.blocks
        )
        return Layout(tuple(self.shape[i] for i in order), blocks)

    def squeeze(self, dim: int) -> Layout:
        dim %= self.ndim
        if self.shape[dim] != 1:
            return self
        blocks = tuple(
            b._replace(at=_without(b.at, dim), shape=_without(b.shape, dim), axes=_without(b.axes, dim))
            for b in self.blocks
        )
        return Layout(_without(self.shape, dim), blocks)

    def unsqueeze(self, dim: int) -> Layout:
        dim %= self.ndim + 1
        blocks = tuple(
            Block(
                b.tensor,
                b.source_shape,
                _insert(b.at, dim, 0),
                _insert(b.shape, dim, 1),
                _insert(b.axes, dim, None),
                b.start,
                b.step,
            )
            for b in self.blocks
        )
        return Layout(_insert(self.shape, dim, 1), blocks)

    def unbind(self) -> list[Layout]:
        """The layouts along the first axis, in time linear in the number of blocks (experts come by the thousand)."""
        rows: list[list[Block]] = [[] for _ in range(self.shape[0])]
        for block in self.blocks:
            for i in range(block.shape[0]):
                axis, start = block.axes[0], block.start
                if axis is not None:
                    start = _with(start, axis, start[axis] + i * block.step[axis])
                box = block.at[1:], block.shape[1:], block.axes[1:]
                rows[block.at[0] + i].append(Block(block.tensor, block.source_shape, *box, start, block.step))
        return [Layout(self.shape[1:], tuple(blocks)) for blocks in rows]

    def split(self, sizes: Sequence[int], dim: int = 0) -> list[Layout]:
        pieces, start = [], 0
        for length in sizes:
            pieces.append(self.narrow(dim, start, start + length))
            start += length
        return pieces

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnlocatableError(f"a conversion uses {name!r}")

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        handler = _HANDLERS.get(getattr(function, "__name__", ""))
        if handler is None:
            raise UnlocatableError(f"a conversion uses {getattr(function, '__name__', function)!r}")
        return handler(*args, **(kwargs or {}))

    def as_matrix_pieces(self) -> tuple[TensorSlice, ...]:
        """The rows as slices, in order, of a layout `(rows, columns)`; UnlocatableError where columns are pieced."""
        if self.ndim != 2:
            raise UnlocatableError(f"a matrix has two axes, this has {self.ndim}")
        pieces, row = [], 0
        blocks = self.blocks if len(self.blocks) == 1 else sorted(self.blocks, key=lambda b: b.at)
        for block in blocks:
            if block.at != (row, 0) or block.shape[1] != self.shape[1]:
                raise UnlocatableError("columns come from several tensors")
            row += block.shape[0]
            pieces.append(_matrix_slice(block))
        return tuple(pieces)


def _matrix_slice(block: Block) -> TensorSlice:
    num_axes = len(block.start)
    squeeze = num_axes == 3 and 0 not in block.axes
    if not (num_axes == 2 or squeeze) or None in block.axes:
        raise UnlocatableError("rows are stacked from vectors or cut from more than three axes")
    rows, columns = block.axes
    assert rows is not None and columns is not None
    if block.step[columns] != 1:
        raise UnlocatableError("columns are interleaved")
    index = [(start, stop) for start, stop, _ in block.region()]
    while len(index) > squeeze and index[-1] == (0, block.source_shape[len(index) - 1]):
        index.pop()
    return TensorSlice(
        block.tensor, tuple(index), squeeze=squeeze, transposed=rows > columns, row_step=block.step[rows]
    )


def _cat(tensors: Sequence[Layout], dim: int = 0) -> Layout:
    dim %= tensors[0].ndim
    blocks: list[Block] = []
    offset = 0
    for tensor in tensors:
        if _without(tensor.shape, dim) != _without(tensors[0].shape, dim):
            raise UnlocatableError(f"shapes {tensor.shape} and {tensors[0].shape} can't be concatenated")
        for b in tensor.blocks:
            at = _with(b.at, dim, b.at[dim] + offset)
            blocks.append(Block(b.tensor, b.source_shape, at, b.shape, b.axes, b.start, b.step))
        offset += tensor.shape[dim]
    return Layout(_with(tensors[0].shape, dim, offset), tuple(blocks))


def _stack(tensors: Sequence[Layout], dim: int = 0) -> Layout:
    return _cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def _chunk(tensor: Layout, chunks: int, dim: int = 0) -> list[Layout]:
    length, size = tensor.shape[dim], max(1, -(-tensor.shape[dim] // chunks))
    return tensor.split([min(size, length - start) for start in range(0, length, size)], dim)


def _split(tensor: Layout, sizes: int | Sequence[int], dim: int = 0) -> list[Layout]:
    if isinstance(sizes, int):
        length = tensor.shape[dim]
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    return tensor.split(sizes, dim)


_HANDLERS: dict[str, Callable[..., Any]] = {
    "cat": _cat,
    "stack": _stack,
    "chunk": _chunk,
    "split": _split,
    "unbind": lambda tensor, dim=0: tensor.transpose(0, dim).unbind() if dim == 0 else _unbind_refused(),
    "transpose": lambda tensor, dim0, dim1: tensor.transpose(dim0, dim1),
    "squeeze": lambda tensor, dim: tensor.squeeze(dim),
}


def _unbind_refused() -> list[Layout]:
    raise UnlocatableError("a conversion unbinds an inner axis")


def _with(values: tuple, i: int, value: Any) -> tuple:
    return (*values[:i], value, *values[i + 1 :])


def _without(values: Iterable, i: int) -> tuple:
    values = tuple(values)
    return (*values[:i], *values[i + 1 :])


def _insert(values: tuple, i: int, value: Any) -> tuple:
    return (*values[:i], value, *values[i:])
