"""A scheduled step bound to a model's weights, a cache and static buffers: one call from Python per step.

Everything a step touches is allocated when the program is made. What has no compiled kernel (a matrix in the checkpoint's
own dtype, a form of the cache that is attended to blockwise) is a call of torch between two stretches of compiled calls,
into the same buffers.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from haversack.engine.decoder.schedule import Action, Schedule, row_elements, row_steps
from haversack.engine.decoder.trace import Node, View
from haversack.engine.kv_cache import HaversackCache
from haversack.engine.packed_tensor import PackedMatrix, PackedTensor
from haversack.errors import UnsupportedModelError
from haversack.kernels import dense, ir_dense, ir_run
from haversack.kernels.attention import DecodeAttention
from haversack.kernels.compiled import CompiledMatvec, Matvec
from haversack.kernels.format import PackedFormat
from haversack.kernels.ir_float import converts_half
from haversack.kernels.ir_rows import RECORD, RowStep, rows_text
from haversack.kernels.ir_tape import APPEND_RECORD, tape_text
from haversack.kernels.llvm import CompiledModule, compile_text, host_target
from haversack.kernels.registry import Chosen, choose
from haversack.kernels.threads import parallel_address
from haversack.parts.kv.layer import RingLayer

_ATTENTION_ARGUMENTS = [("ptr", "job"), ("ptr", "parallel"), ("i32", "threads")]
_THUNKS = {"matmul": ir_run.ENTRY_ARGUMENTS, "attention": _ATTENTION_ARGUMENTS}
_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


class StepProgram:
    """One step for `schedule.batch_size` sequences over `cache`, which the caller has filled.

    `tokens` `(batch, 1)` is what goes in, `logits` `(batch, vocab_size)` what comes out. `num_bytes` is what is allocated.
    """

    def __init__(self, schedule: Schedule, cache: HaversackCache):
        self.schedule = schedule
        self.batch_size = schedule.batch_size
        self.arena = torch.empty(schedule.arena_bytes + 64, dtype=torch.uint8)
        self._base = -(-self.arena.data_ptr() // 64) * 64
        self.tokens = torch.zeros(self.batch_size, 1, dtype=torch.int64)
        self.positions = torch.zeros(self.batch_size, 1, dtype=torch.int64)
        self._threads = torch.get_num_threads()
        self._tape_module = _tape()
        self._run = _RUN(self._tape_module.address("run"))
        self._keep: list[Any] = []  # what addresses in records point to
        self._calls: list[tuple[int, int]] = []  # the compiled stretch that is being written
        self._stretches: list[Callable[[], None]] = []
        self._counts = (ctypes.c_int64 * self.batch_size)()
        self._workspace = torch.empty(self._workspace_bytes(), dtype=torch.uint8)
        self._layers = self._bind_layers(cache)
        for action in schedule.actions:
            self._bind(action)
        self._end_stretch()
        self._append = self._bind_appends()
        self.follow()
        view = schedule.graph.logits
        self.logits = self._tensor(view.node, view.offset, view.sizes, view.strides).view(self.batch_size, -1)

    @property
    def num_bytes(self) -> int:
        """Static buffers: the arena and the kernels' workspace."""
        return self.arena.nbytes + self._workspace.nbytes + 16 * self.batch_size

    def table(self, node: Node) -> torch.Tensor:
        """The buffer of a function of positions, to be filled before a step."""
        return self._tensor(node, 0, tuple(node.layout.shape), tuple(node.layout.strides))

    def run(self) -> None:
        """Compute the logits of `tokens` at `positions`, and store their keys and values."""
        for stretch in self._stretches:
            stretch()
        self._store()

    # Buffers

    def _address(self, node: Node) -> int:
        if node.is_constant:
            assert node.tensor is not None
            return node.tensor.untyped_storage().data_ptr()
        return self._base + self.schedule.offsets[node]

    def _tensor(self, node: Node, offset: int, sizes: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
        """A tensor over a node's buffer, the batch as its first axis."""
        start = self._address(node) - self.arena.data_ptr()
        size = node.layout.dtype.itemsize
        whole = self.arena[start : start + self.batch_size * row_elements(node) * size].view(node.layout.dtype)
        return whole.as_strided(
            (self.batch_size, *sizes[1:]), (row_elements(node), *strides[1:]), whole.storage_offset() + offset
        )

    def _view(self, view: View) -> torch.Tensor:
        return self._tensor(view.node, view.offset, view.sizes, view.strides)

    def _operand(self, view: View) -> torch.Tensor:
        """A view as torch takes it, of whatever node."""
        if view.node.is_constant:
            return _constant(view)
        if view.node.kind in ("tokens", "positions"):
            given = self.tokens if view.node.kind == "tokens" else self.positions
            return given.as_strided((self.batch_size, *view.sizes[1:]), view.strides)
        return self._view(view)

    def _record(self, words: Sequence[int]) -> int:
        """The address of a record that lives as long as the program."""
        record = (ctypes.c_int64 * len(words))(*words)
        self._keep.append(record)
        return ctypes.addressof(record)

    # Actions

    def _call(self, function: int, record: int) -> None:
        self._calls.append((function, record))

    def _end_stretch(self) -> None:
        if self._calls:
            tape = self._record([word for call in self._calls for word in call])
            run, count = self._run, len(self._calls)
            self._stretches.append(lambda: run(tape, count))
            self._calls = []

    def _torch(self, function: Callable[[], Any]) -> None:
        """A call of torch between compiled stretches."""
        self._end_stretch()
        self._stretches.append(function)

    def _bind(self, action: Action) -> None:
        {
            "rows": self._rows,
            "linear": self._linears,
            "attention": self._attention,
            "embedding": self._embedding,
            "torch": self._call_torch,
        }[action.kind](action.nodes)

    def _rows(self, nodes: Sequence[Node]) -> None:
        slots: dict[Node, int] = {}
        steps = tuple(step for node in nodes for step in row_steps(node, slots))
        if any(node.layout.dtype == torch.float16 for node in nodes) and not converts_half(host_target()):
            raise UnsupportedModelError("it computes in float16, which this CPU does not convert")
        module = _row_program(steps)
        words = [0, self.batch_size, parallel_address(), self._threads]
        assert len(words) == len(RECORD)
        self._keep.append(module)
        self._call(module.address("rows"), self._record([*words, *(self._address(node) for node in slots)]))

    def _embedding(self, nodes: Sequence[Node]) -> None:
        (node,) = nodes
        weight, out = node.facts["weight"], self._tensor(node, 0, node.layout.shape, node.layout.strides)
        index = self.tokens if node.op == "tokens" else self.positions
        if isinstance(weight, PackedTensor):
            self._torch(lambda: out.copy_(weight.embedding(index)))
        else:
            table = weight.detach()
            self._torch(lambda: torch.index_select(table, 0, index[:, 0], out=out[:, 0]))

    def _linears(self, nodes: Sequence[Node]) -> None:
        """All matrices of one input: those of one compiled kernel in one call."""
        (source,) = nodes[0].inputs
        assert isinstance(source, View)
        in_features = source.sizes[-1]
        x = self._view(source).view(self.batch_size, in_features)
        if not x.is_contiguous():
            raise UnsupportedModelError("a matrix reads rows that lie apart")
        by_kernel: dict[Matvec, list[tuple[PackedMatrix, int]]] = {}
        for node in nodes:
            out = self._tensor(node, 0, node.layout.shape, node.layout.strides).view(self.batch_size, -1)
            weight = node.facts["weight"]
            matrices = _matrices(weight)
            compiled = [_compiled_kernel(m, self.batch_size, x.dtype) for m, _ in matrices]
            if matrices and all(compiled) and (len(matrices) == 1 or self.batch_size == 1):
                for (matrix, rows), kernel in zip(matrices, compiled, strict=True):
                    assert kernel is not None
                    start = out.data_ptr() + (rows.start or 0) * out.element_size()
                    by_kernel.setdefault(kernel, []).append((matrix, start))
            else:
                self._torch(_product(x, weight, out, self._workspace))
        for kernel, group in by_kernel.items():
            self._matmul(kernel, group, x)

    def _call_torch(self, nodes: Sequence[Node]) -> None:
        views = [view for view in nodes[0].inputs if isinstance(view, View)]
        tensors = [self._operand(view) for view in views]
        outs = [(node.facts["index"], self._tensor(node, 0, node.layout.shape, node.layout.strides)) for node in nodes]
        call = nodes[0].facts["call"]

        def run() -> None:
            found = call(tensors)
            for index, out in outs:
                out.copy_(found[index])

        self._torch(run)

    def _matmul(self, kernel: Matvec, group: Sequence[tuple[PackedMatrix, int]], x: torch.Tensor) -> None:
        words: list[int] = []
        for matrix, out in group:
            tensors = matrix.tensors()
            zeros = tensors.get("zeros")
            self._keep.append(tensors)
            words += [tensors["codes"].data_ptr(), tensors["scales"].data_ptr()]
            words += [0 if zeros is None else zeros.data_ptr(), out, matrix.out_features]
        limits = [_chosen(m, kernel.case.fmt, self.batch_size, x.dtype).threads for m, _ in group]
        threads = min([self._threads, *(limit for limit in limits if limit is not None)])
        given = kernel.call_words(sum(m.out_features for m, _ in group), self.batch_size, threads)
        given |= {
            "x": x.data_ptr(),
            "workspace": self._workspace.data_ptr(),
            "matrices": self._record(words),
            "num_matrices": len(group),
        }
        entry = kernel.module.address("run")
        record = self._record([entry, *(given[name] for _, name in ir_run.ENTRY_ARGUMENTS)])
        self._keep.append(kernel)
        self._call(self._tape_module.address("thunk_matmul"), record)

    def _attention(self, nodes: Sequence[Node]) -> None:
        (node,) = nodes
        layer = self._layers[node]
        query, keys, values = (self._view(view) for view in node.inputs if isinstance(view, View))
        out = self._tensor(node, 0, node.layout.shape, node.layout.strides)
        sinks = None if node.facts["sinks"] is None else _constant(node.facts["sinks"])
        decoder = layer.store.decoder(node.facts["softcap"])
        by_head = query.stride(3) == 1 and query.stride(1) == query.shape[3]
        if not isinstance(decoder, DecodeAttention) or not by_head or keys.stride(3) != 1 or values.stride(3) != 1:
            facts = {"scaling": node.facts["scaling"], "softcap": node.facts["softcap"], "sinks": sinks}

            def attend() -> None:
                out.copy_(layer.store.attend(query, keys, values, **facts)[0].transpose(1, 2))

            self._torch(attend)
            return
        size = query.element_size()
        logits = None if sinks is None else sinks.to(torch.float32).contiguous()
        self._keep.append((decoder, logits))
        splits = decoder.form.splits(self.batch_size, self._threads)
        decoder = decoder.another()
        decoder.set(
            query=query.data_ptr(), query_stride=query.stride(0) * size,
            new_keys=keys.data_ptr(), new_key_stride=keys.stride(0) * size, new_key_head_stride=keys.stride(1) * size,
            new_values=values.data_ptr(), new_value_stride=values.stride(0) * size,
            new_value_head_stride=values.stride(1) * size,
            out=out.data_ptr(), out_stride=out.stride(0) * size, lse=0,
            logits=0 if logits is None else logits.data_ptr(),
            scaling=struct.unpack("<I", struct.pack("<f", node.facts["scaling"]))[0],
            num_rows=self.batch_size, splits=splits, partials=self._workspace.data_ptr(),
            counts=ctypes.addressof(self._counts), packed_until=ctypes.addressof(layer.packed_until),
        )  # fmt: skip
        self._keep.append(decoder)
        words = [decoder.module.address("run"), ctypes.addressof(decoder.job), parallel_address(), self._threads]
        self._call(self._tape_module.address("thunk_attention"), self._record(words))

    def _workspace_bytes(self) -> int:
        """The largest workspace of any kernel; they take turns."""
        largest = 64
        for action in self.schedule.actions:
            for node in action.nodes:
                if action.kind == "linear":
                    (source,) = node.inputs
                    assert isinstance(source, View)
                    largest = max(largest, ir_dense.workspace_bytes(self.batch_size, source.sizes[-1]))
                    for matrix, _ in _matrices(node.facts["weight"]):
                        kernel = _compiled_kernel(matrix, self.batch_size, node.layout.dtype)
                        if kernel is not None:
                            largest = max(largest, kernel.case.workspace_bytes(self.batch_size))
        return largest

    # The cache

    def _bind_layers(self, cache: HaversackCache) -> dict[Node, _Layer]:
        attentions = [node for node in self.schedule.graph.nodes if node.kind == "attention"]
        if len(attentions) != len(cache.planned):
            raise UnsupportedModelError(f"{len(attentions)} layers attend, but the cache has {len(cache.planned)}")
        layers: dict[Node, _Layer] = {}
        for i, node in enumerate(attentions):
            planned = cache.planned[i if node.facts["layer"] is None else node.facts["layer"]]
            store = planned.store
            if not isinstance(store, RingLayer) or store.batch_size != self.batch_size:
                raise UnsupportedModelError(f"{planned.site.id}: its cache is of another kind or batch")
            if planned.site.window_tokens != node.facts["window"]:
                raise UnsupportedModelError(f"{planned.site.id}: it attends with a window of {node.facts['window']}")
            decoder = store.decoder(node.facts["softcap"])
            if isinstance(decoder, DecodeAttention):
                needed = decoder.form.workspace_bytes(self.batch_size, self._threads)
                if needed > self._workspace.nbytes:
                    self._workspace = torch.empty(needed, dtype=torch.uint8)
            layers[node] = _Layer(planned, store, node, self.batch_size)
        return layers

    def follow(self) -> None:
        """Take over from the cache what it holds: before the first step, and when others stored tokens or took them back."""
        counts = {tuple(layer.store.counts) for layer in self._layers.values()}
        if len(counts) != 1:
            raise UnsupportedModelError("the cache's layers have seen different tokens")
        for row, count in enumerate(next(iter(counts))):
            self._counts[row] = count
            self.positions[row, 0] = count
        for layer in self._layers.values():
            layer.follow()

    def _bind_appends(self) -> Callable[[], None]:
        calls: list[int] = []
        for node, layer in self._layers.items():
            store = layer.store
            _, keys, values = (self._view(view) for view in node.inputs if isinstance(view, View))
            layer.new = (keys, values)
            words = {
                "num_rows": self.batch_size,
                "num_kv_heads": keys.shape[1],
                "counts": ctypes.addressof(self._counts),
                "sink_tokens": store.regions.sink_tokens,
                "ring_tokens": store.ring_tokens,
                "slots": store.tensors["keys"].shape[2],
            }
            for name, new in (("key", keys), ("value", values)):
                words[f"new_{name}s"] = new.data_ptr()
                words[f"new_{name}_stride"] = new.stride(0) * new.element_size()
                words[f"new_{name}_head_stride"] = new.stride(1) * new.element_size()
                words[f"{name}s"] = store.tensors[f"{name}s"].data_ptr()
                words[f"{name}_bytes"] = new.shape[3] * new.element_size()
            calls += [self._tape_module.address("append"), self._record([words[n] for n in APPEND_RECORD])]
        tape, run, count = self._record(calls), self._run, len(calls) // 2
        return lambda: run(tape, count)

    def _store(self) -> None:
        """The new token of every sequence into every layer; by the layers themselves where one packs a group."""
        layers = self._layers.values()
        if any(layer.store.packs_at_next_append() for layer in layers):
            for layer in layers:
                layer.store.append(*layer.new)
                layer.follow()
        else:
            self._append()
            for layer in layers:
                layer.store.note_appended()
        for layer in layers:
            layer.planned.columns += 1
        for row in range(self.batch_size):
            self._counts[row] += 1
        self.positions += 1


class _Layer:
    """A layer of the cache as a program sees it."""

    def __init__(self, planned: Any, store: RingLayer, node: Node, batch_size: int):
        self.planned = planned
        self.store = store
        self.packed_until = (ctypes.c_int64 * batch_size)()
        self.new: tuple[torch.Tensor, torch.Tensor]

    def follow(self) -> None:
        for row, until in enumerate(self.store.packed_until):
            self.packed_until[row] = until


def _matrices(weight: Any) -> list[tuple[PackedMatrix, slice]]:
    """The packed matrices of a parameter with their rows, in one piece each; none for a plain parameter."""
    if not isinstance(weight, PackedTensor) or any((block.rows.step or 1) != 1 for block in weight.blocks):
        return []
    return [(block.matrix, block.rows) for block in weight.blocks]


def _compiled_kernel(matrix: PackedMatrix, batch_size: int, dtype: torch.dtype) -> Matvec | None:
    """The matvec that computes this matrix for one token of each sequence; None for other kernels."""
    option = matrix.option
    fmt = None if option.grid is None else option.grid.packed_format(matrix.in_features)
    if option.grid is None or fmt is None or option.transforms or option.corrections:
        return None
    if dtype == torch.float16:  # the kernels behind it convert their input first
        return None
    kernel = _chosen(matrix, fmt, batch_size, dtype).kernel
    if not isinstance(kernel, CompiledMatvec) or option.grid.activation_bits < kernel.activation_bits:
        return None
    return kernel.matvec(fmt, batch_size, dtype)


def _chosen(matrix: PackedMatrix, fmt: PackedFormat, batch_size: int, dtype: torch.dtype) -> Chosen:
    assert matrix.option.grid is not None
    return choose(fmt, batch_size, matrix.out_features, dtype, matrix.option.grid.activation_bits)


def _product(x: torch.Tensor, weight: Any, out: torch.Tensor, workspace: torch.Tensor) -> Callable[[], Any]:
    """`out = x W^T` by torch or by the registry's kernels; a plain matrix by the compiled product where there are few tokens."""
    plain = weight.detach() if not isinstance(weight, PackedTensor) else None
    if plain is None:
        matrices = _matrices(weight)
        if len(matrices) != 1 or not matrices[0][0].option.is_neutral:
            return lambda: out.copy_(weight.linear(x))
        plain = matrices[0][0].tensors()["weight"]
    if dense.supports(x, plain):
        return dense.prepared(x, plain, out, workspace)
    transposed = plain.t()
    return lambda: torch.mm(x, transposed, out=out)


def _constant(view: View) -> torch.Tensor:
    assert view.node.tensor is not None
    return view.node.tensor.as_strided(view.sizes, view.strides, view.offset).detach()


@cache
def _row_program(steps: tuple[RowStep, ...]) -> CompiledModule:
    return compile_text(rows_text(steps, host_target()), host_target())


@cache
def _tape() -> CompiledModule:
    return compile_text(tape_text(_THUNKS), host_target())
