"""The traced step in the order it runs, and where its numbers lie: few buffers, used again as soon as they are free.

Matrices that read the same numbers become one action, so that one kernel call computes them; what lies between products
and attention becomes one program over rows. Nothing here knows an address, so that a plan can ask for the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from haversack.engine.decoder.trace import TRACED_ROWS, Layout, Node, StepGraph, View
from haversack.errors import UnsupportedModelError
from haversack.kernels.ir_rows import DTYPE_BYTES, FUNCTIONS, Operand, RowStep

ALIGNMENT = 64


@dataclass(frozen=True)
class Action:
    """`kind` is "rows" (a program over `nodes`), "linear" (of one input), "torch" (of one call), "attention" or
    "embedding" (one node)."""

    kind: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Schedule:
    """`actions` in order; `offsets` of every tensor's buffer in an arena of `arena_bytes`, for `batch_size` sequences."""

    graph: StepGraph
    batch_size: int
    actions: tuple[Action, ...]
    offsets: dict[Node, int]
    arena_bytes: int


def schedule_step(graph: StepGraph, batch_size: int) -> Schedule:
    """Raises UnsupportedModelError for tensors that are not one row per sequence, or of another dtype."""
    actions = tuple(_actions(graph))
    offsets, arena_bytes = _place(graph, actions, batch_size)
    return Schedule(graph, batch_size, actions, offsets, arena_bytes)


def row_elements(node: Node) -> int:
    """Numbers of one sequence."""
    return node.layout.numel() // TRACED_ROWS


def dtype_name(tensor: Layout | torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise UnsupportedModelError(f"a step computes in {name}, which is not compiled")
    return name


def constant_bytes(graph: StepGraph) -> int:
    """Constants that the trace made itself (a norm's weight plus one), which live beside the model's parameters."""
    own = [n.tensor.untyped_storage() for n in graph.nodes if n.tensor is not None and n.op != "parameter"]
    return sum({storage._cdata: storage.nbytes() for storage in own}.values())


def row_steps(node: Node, slots: dict[Node, int]) -> list[RowStep]:
    """The steps of a row program that compute a node; pointers get numbers in `slots` as they are met."""
    out = View(node, 0, tuple(node.layout.shape), tuple(node.layout.strides))
    if node.kind == "cat":
        steps, start = [], 0
        for part in node.inputs:
            assert isinstance(part, View)
            piece = View(node, start * out.strides[-1], part.sizes, out.strides)
            steps.append(_step("copy", part.sizes[1:], (part,), piece, slots))
            start += part.sizes[-1]
        return steps
    if node.kind == "stack":
        pieces = [View(node, i * out.strides[-1], out.sizes[:-1], out.strides[:-1]) for i in range(len(node.inputs))]
        return [
            _step("copy", piece.sizes[1:], (part,), piece, slots)
            for part, piece in zip(node.inputs, pieces, strict=True)
        ]
    if node.kind == "mean":
        (source,) = node.inputs
        assert isinstance(source, View)
        out = View(node, 0, (*out.sizes[:-1], source.sizes[-1]), (*out.strides[:-1], 0))
        return [_step("mean", source.sizes[1:], (source,), out, slots)]
    return [_step(node.op, out.sizes[1:], node.inputs, out, slots)]


def _actions(graph: StepGraph) -> list[Action]:
    """Row programs as long as possible, and linears of one input together."""
    actions: list[Action] = []
    rows: list[Node] = []
    done: set[Node] = set()

    def flush() -> None:
        if rows:
            actions.append(Action("rows", tuple(rows)))
            rows.clear()

    for i, node in enumerate(graph.nodes):
        if node in done or node.kind in ("constant", "tokens", "positions", "table"):
            continue
        if node.kind in ("map", "mean", "cat", "stack"):
            if node.kind == "map" and node.op not in FUNCTIONS:
                raise UnsupportedModelError(f"a step has the operation {node.op}, which is not compiled")
            rows.append(node)
            continue
        flush()
        group: tuple[Node, ...] = (node,)
        if node.kind == "linear":
            group = tuple(n for n in graph.nodes[i:] if n.kind == "linear" and n.inputs == node.inputs)
        elif node.kind == "torch":
            group = tuple(n for n in graph.nodes[i:] if n.facts.get("call") is node.facts["call"])
            for view in (v for v in node.inputs if isinstance(v, View) and not v.node.is_constant):
                if view.sizes[0] != TRACED_ROWS or view.strides[0] not in (0, row_elements(view.node)):
                    raise UnsupportedModelError(f"a step calls {node.op} on sequences that lie apart")
        actions.append(Action(node.kind, group))
        done.update(group)
    flush()
    return actions


def _place(graph: StepGraph, actions: tuple[Action, ...], batch_size: int) -> tuple[dict[Node, int], int]:
    """Offsets of buffers; one is free for others after the last action that reads it."""
    last_use: dict[Node, int] = {}
    for i, action in enumerate(actions):
        for node in action.nodes:
            last_use[node] = i
            for parent in node.parents:
                last_use[parent] = i
    end = len(actions)
    keep = {graph.logits.node, *graph.tables}
    for node in graph.nodes:
        if node.kind == "attention":  # new keys and values are stored when the step is over
            keep |= {view.node for view in node.inputs[1:] if isinstance(view, View)}
    offsets: dict[Node, int] = {}
    free: list[tuple[int, int]] = []  # (start, stop), apart from each other, in order
    top = 0

    def take(node: Node) -> None:
        nonlocal top
        layout = node.layout
        if layout.shape[0] != TRACED_ROWS or layout.stride(0) != row_elements(node) or layout.offset:
            raise UnsupportedModelError(f"a step makes {tuple(layout.shape)} of {node.op}, not one row per sequence")
        num_bytes = batch_size * row_elements(node) * layout.dtype.itemsize
        num_bytes = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        fits = [span for span in free if span[1] - span[0] >= num_bytes]
        if fits:
            span = min(fits, key=lambda s: s[1] - s[0])
            free.remove(span)
            offsets[node] = span[0]
            if span[0] + num_bytes < span[1]:
                free.append((span[0] + num_bytes, span[1]))
        else:
            offsets[node] = top
            top += num_bytes
        spans[node] = (offsets[node], offsets[node] + num_bytes)

    spans: dict[Node, tuple[int, int]] = {}
    for node in graph.tables:
        if node in last_use:
            take(node)
    for i, action in enumerate(actions):
        for node in action.nodes:
            take(node)
        for node in [n for n in spans if last_use[n] <= i and n not in keep and i < end]:
            free.append(spans.pop(node))
            _merge(free)
    return offsets, top


def _merge(free: list[tuple[int, int]]) -> None:
    free.sort()
    merged = [free[0]]
    for start, stop in free[1:]:
        if start == merged[-1][1]:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    free[:] = merged


def _step(
    op: str, sizes: tuple[int, ...], inputs: tuple[View | float, ...], out: View, slots: dict[Node, int]
) -> RowStep:
    """One loop nest without axes of length one, and with neighbouring axes joined where all operands allow it."""
    axes = [axis for axis, size in enumerate(sizes) if size != 1] or [len(sizes) - 1]
    strides = [x if isinstance(x, float) else [_stride(x, axis - len(sizes)) for axis in axes] for x in (*inputs, out)]
    lengths = [sizes[axis] for axis in axes]
    at = 0
    last = len(lengths) - (2 if op == "mean" else 1)
    while at < last:
        joined = all(isinstance(s, float) or s[at] == s[at + 1] * lengths[at + 1] for s in strides)
        if joined:
            lengths[at] *= lengths.pop(at + 1)
            for s in strides:
                if not isinstance(s, float):
                    del s[at]
            last -= 1
        else:
            at += 1
    operands: list[Operand | float] = []
    for x, s in zip((*inputs, out), strides, strict=True):
        if isinstance(x, float):
            operands.append(x)
            continue
        assert not isinstance(s, float)
        constant = x.node.is_constant
        slot = slots.setdefault(x.node, len(slots))
        row_stride = 0 if constant else row_elements(x.node)
        operands.append(Operand(slot, dtype_name(x.node.layout), row_stride, x.offset, tuple(s)))
    *read, written = operands
    assert isinstance(written, Operand)
    return RowStep(op, tuple(lengths), tuple(read), written)


def _stride(view: View, axis: int) -> int:
    """Along an axis counted from the end; 0 where the view is broadcast."""
    if -axis > len(view.sizes) or view.sizes[axis] == 1:
        return 0
    return view.strides[axis]
