"""A scheduled step bound to a model's weights, a cache and static buffers: one call from Python per step.

Everything a step touches is allocated when the program is made. What has no compiled kernel (a matrix in the checkpoint's
own dtype, a form of the cache that is attended to blockwise) is a call of torch between two stretches of compiled calls,
into the same buffers.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from haversack.engine.decoder.schedule import Action, Schedule, row_elements, row_steps
from haversack.engine.decoder.trace import Node, View
from haversack.engine.kv_cache import HaversackCache
from haversack.engine.packed_tensor import PackedMatrix, PackedTensor
from haversack.errors import UnsupportedModelError
from haversack.kernels import dense, ir_dense, ir_run, superscales
from haversack.kernels.attention import CacheForm, DecodeAttention
from haversack.kernels.compiled import CompiledMatvec, Matvec
from haversack.kernels.format import PackedFormat
from haversack.kernels.ir_float import converts_half
from haversack.kernels.ir_rows import RECORD, RowStep, rows_text
from haversack.kernels.ir_tape import APPEND_RECORD, tape_text
from haversack.kernels.ir_team import TEAM_ARGUMENTS
from haversack.kernels.llvm import CompiledModule, compile_text, host_target
from haversack.kernels.registry import Chosen, choose
from haversack.kernels.threads import parallel_address
from haversack.parts.kv.bands import BandedLayer, cut_heads
from haversack.parts.kv.base import KVLayer
from haversack.parts.kv.layer import RingLayer

if TYPE_CHECKING:
    from haversack.kernels.ir_superscales import SuperscaleCase

_THUNKS = {"matmul": ir_run.ENTRY_ARGUMENTS, "job": [("ptr", "job"), *TEAM_ARGUMENTS]}
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
        by_kernel: dict[Matvec, list[_Product]] = {}
        for node in nodes:
            out = self._tensor(node, 0, node.layout.shape, node.layout.strides).view(self.batch_size, -1)
            weight = node.facts["weight"]
            matrices = _matrices(weight)
            compiled = [_compiled_kernel(m, self.batch_size, x.dtype) for m, _ in matrices]
            if matrices and all(compiled):
                for (matrix, rows), kernel in zip(matrices, compiled, strict=True):
                    assert kernel is not None
                    start = out.data_ptr() + (rows.start or 0) * out.element_size()
                    by_kernel.setdefault(kernel, []).append(_Product(matrix, start, out.stride(0)))
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

    def _matmul(self, kernel: Matvec, group: Sequence[_Product], x: torch.Tensor) -> None:
        """One call for all matrices, or one for as many as the workspace has room for scales of."""
        self._keep.append(kernel)
        limits = [_chosen(p.matrix, kernel.case.fmt, self.batch_size, x.dtype).threads for p in group]
        threads = min([self._threads, *(limit for limit in limits if limit is not None)])
        scales_at = kernel.case.workspace_bytes(self.batch_size)
        words: list[int] = []
        num_rows = used = 0

        def flush() -> None:
            nonlocal num_rows, used
            given = kernel.call_words(num_rows, self.batch_size, threads) | {
                "x": x.data_ptr(),
                "workspace": self._workspace.data_ptr(),
                "matrices": self._record(words),
                "num_matrices": len(words) // ir_run.MATRIX_WORDS,
            }
            entry = kernel.module.address("run")
            record = self._record([entry, *(given[name] for _, name in ir_run.ENTRY_ARGUMENTS)])
            self._call(self._tape_module.address("thunk_matmul"), record)
            words.clear()
            num_rows = used = 0

        for product in group:
            matrix, tensors = product.matrix, product.matrix.tensors()
            self._keep.append(tensors)
            for first, stop in _pieces(matrix):
                scale_bytes = _written_scale_bytes(matrix, stop - first)
                if scales_at + used + scale_bytes > self._workspace.nbytes:
                    flush()
                part = {name: tensor[first:stop] for name, tensor in tensors.items()}
                zeros, scales = part.get("zeros"), part["scales"].data_ptr()
                if scale_bytes:
                    scales = self._workspace.data_ptr() + scales_at + used
                    self._write_scales(matrix, part, scales)
                    used += scale_bytes
                words += [part["codes"].data_ptr(), scales, 0 if zeros is None else zeros.data_ptr()]
                words += [product.out + first * x.element_size(), stop - first, product.out_stride]
                num_rows += stop - first
        flush()

    def _write_scales(self, matrix: PackedMatrix, tensors: Mapping[str, torch.Tensor], out: int) -> None:
        """Second-level scales as kernels read them, to an address in the workspace: before the product, at every step."""
        case = _superscale_case(matrix)
        assert case is not None
        module = superscales.compiled(case)
        self._keep.append(module)
        job = self._record(superscales.job_words(tensors["scales"], tensors["superscales"], out))
        threads = min(self._threads, superscales.num_threads(len(tensors["scales"])))
        words = [module.address("run"), job, parallel_address(), threads]
        self._call(self._tape_module.address("thunk_job"), self._record(words))

    def _attention(self, nodes: Sequence[Node]) -> None:
        (node,) = nodes
        layer = self._layers[node]
        query, keys, values = (self._view(view) for view in node.inputs if isinstance(view, View))
        out = self._tensor(node, 0, node.layout.shape, node.layout.strides)
        sinks = None if node.facts["sinks"] is None else _constant(node.facts["sinks"])
        by_head = query.stride(3) == 1 and query.stride(1) == query.shape[3]
        if not layer.is_compiled or not by_head or keys.stride(3) != 1 or values.stride(3) != 1:
            facts = {"scaling": node.facts["scaling"], "softcap": node.facts["softcap"], "sinks": sinks}
            attend = layer.store.attend if layer.rings else layer.store.step
            self._torch(lambda: out.copy_(attend(query, keys, values, **facts)[0].transpose(1, 2)))
            return
        size, groups = query.element_size(), query.shape[1] // keys.shape[1]
        logits = None if sinks is None else sinks.to(torch.float32).contiguous()
        self._keep.append(logits)
        for ring in layer.rings:
            whole = ring.store.decoder(node.facts["softcap"])
            assert isinstance(whole, DecodeAttention)
            for run in ring.runs:
                head, decoder = run.head * groups, whole.of_heads(run.slab_head, run.num_heads)
                decoder.set(
                    query=query[:, head:].data_ptr(), query_stride=query.stride(0) * size,
                    new_keys=keys[:, run.head :].data_ptr(),
                    new_key_stride=keys.stride(0) * size, new_key_head_stride=keys.stride(1) * size,
                    new_values=values[:, run.head :].data_ptr(), new_value_stride=values.stride(0) * size,
                    new_value_head_stride=values.stride(1) * size,
                    out=out[:, :, head:].data_ptr(), out_stride=out.stride(0) * size, lse=0,
                    logits=0 if logits is None else logits[head:].data_ptr(),
                    scaling=struct.unpack("<I", struct.pack("<f", node.facts["scaling"]))[0],
                    num_rows=self.batch_size, splits=self._splits(whole.form, decoder.form),
                    partials=self._workspace.data_ptr(),
                    counts=ctypes.addressof(self._counts), packed_until=ctypes.addressof(ring.packed_until),
                )  # fmt: skip
                self._keep.append(decoder)
                words = [
                    decoder.module.address("run"),
                    ctypes.addressof(decoder.job),
                    parallel_address(),
                    self._threads,
                ]
                self._call(self._tape_module.address("thunk_job"), self._record(words))

    def _splits(self, whole: CacheForm, run: CacheForm) -> int:
        """Parts of the context for a run of heads, in no more workspace than all heads of its ring take."""
        states = whole.num_heads * whole.splits(self.batch_size, self._threads)
        return max(1, min(run.splits(self.batch_size, self._threads), states // run.num_heads))

    def _workspace_bytes(self) -> int:
        """The largest workspace of any kernel, with the scales that are written out for it; they take turns."""
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
                            written = max(_written_scale_bytes(matrix, b - a) for a, b in _pieces(matrix))
                            largest = max(largest, kernel.case.workspace_bytes(self.batch_size) + written)
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
            if store is None or store.batch_size != self.batch_size:
                raise UnsupportedModelError(f"{planned.site.id}: its cache is empty or of another batch")
            if planned.site.window_tokens != node.facts["window"]:
                raise UnsupportedModelError(f"{planned.site.id}: it attends with a window of {node.facts['window']}")
            layers[node] = layer = _Layer(planned, store, node.facts["softcap"])
            for ring in layer.rings if layer.is_compiled else ():
                decoder = ring.store.decoder(node.facts["softcap"])
                assert isinstance(decoder, DecodeAttention)
                needed = decoder.form.workspace_bytes(self.batch_size, self._threads)
                if needed > self._workspace.nbytes:
                    self._workspace = torch.empty(needed, dtype=torch.uint8)
        return layers

    def follow(self) -> None:
        """Take over from the cache what it holds: before the first step, and when others stored tokens or took them back."""
        counts = {layer.store.seen_tokens() for layer in self._layers.values()}
        if len(counts) != 1:
            raise UnsupportedModelError("the cache's layers have seen different tokens")
        for row, count in enumerate(next(iter(counts))):
            self._counts[row] = count
            self.positions[row, 0] = count
        for ring in self._rings():
            ring.follow()

    def _rings(self) -> list[_Ring]:
        return [ring for layer in self._layers.values() for ring in layer.rings]

    def _bind_appends(self) -> Callable[[], None]:
        calls: list[int] = []
        for node, layer in self._layers.items():
            _, keys, values = (self._view(view) for view in node.inputs if isinstance(view, View))
            for ring in layer.rings:
                ring.new = (keys, values)
                for run in ring.runs:
                    calls += [self._tape_module.address("append"), self._record(self._append_words(ring, run))]
        tape, run_tape, count = self._record(calls), self._run, len(calls) // 2
        return lambda: run_tape(tape, count)

    def _append_words(self, ring: _Ring, run: _Run) -> list[int]:
        store = ring.store
        words = {
            "num_rows": self.batch_size,
            "num_kv_heads": run.num_heads,
            "num_slab_heads": store.site.num_kv_heads,
            "counts": ctypes.addressof(self._counts),
            "sink_tokens": store.regions.sink_tokens,
            "ring_tokens": store.ring_tokens,
            "slots": store.tensors["keys"].shape[2],
        }
        for name, new in zip(("key", "value"), ring.new, strict=True):
            words[f"new_{name}s"] = new[:, run.head :].data_ptr()
            words[f"new_{name}_stride"] = new.stride(0) * new.element_size()
            words[f"new_{name}_head_stride"] = new.stride(1) * new.element_size()
            words[f"{name}s"] = store.tensors[f"{name}s"][:, run.slab_head :].data_ptr()
            words[f"{name}_bytes"] = new.shape[3] * new.element_size()
        return [words[name] for name in APPEND_RECORD]

    def _store(self) -> None:
        """The new token of every sequence into every ring; by the rings themselves where one packs a group. Other layers have
        stored it when they attended."""
        rings = self._rings()
        if any(ring.store.packs_at_next_append() for ring in rings):
            for ring in rings:
                ring.store.append(*(cut_heads(new, ring.heads) for new in ring.new))
                ring.follow()
        else:
            self._append()
            for ring in rings:
                ring.store.note_appended()
        for layer in self._layers.values():
            layer.planned.columns += 1
        for row in range(self.batch_size):
            self._counts[row] += 1
        self.positions += 1


class _Run(NamedTuple):
    """KV heads that lie side by side both in the layer, from `head` on, and in their slab, from `slab_head` on."""

    head: int
    slab_head: int
    num_heads: int


class _Ring:
    """A ring of the cache and the layer's KV heads that it holds, as a program sees it."""

    def __init__(self, store: RingLayer, heads: Sequence[int]):
        self.store = store
        self.heads = tuple(heads)
        self.packed_until = (ctypes.c_int64 * store.batch_size)()
        self.new: tuple[torch.Tensor, torch.Tensor]  # of all the layer's heads
        starts = [i for i, head in enumerate(self.heads) if not i or head != self.heads[i - 1] + 1]
        ends = [*starts[1:], len(self.heads)]
        self.runs = [_Run(self.heads[i], i, end - i) for i, end in zip(starts, ends, strict=True)]

    def follow(self) -> None:
        for row, until in enumerate(self.store.packed_until):
            self.packed_until[row] = until


class _Layer:
    """A layer of the cache as a program sees it: rings, which compiled code writes to and, if it can, attends to; or none, and
    the layer attends and stores by itself."""

    def __init__(self, planned: Any, store: KVLayer, softcap: float | None):
        self.planned = planned
        self.store = store
        parts: list[tuple[Sequence[int], KVLayer]] = [(range(store.site.num_kv_heads), store)]
        if isinstance(store, BandedLayer):
            parts = [(band.heads, layer) for band, layer in zip(store.bands, store.layers, strict=True)]
        rings = [_Ring(part, heads) for heads, part in parts if isinstance(part, RingLayer) and not part.learns]
        self.rings = rings if len(rings) == len(parts) else []
        decoders = [ring.store.decoder(softcap) for ring in self.rings]
        self.is_compiled = bool(decoders) and all(isinstance(decoder, DecodeAttention) for decoder in decoders)


class _Product(NamedTuple):
    """A packed matrix and where its outputs go: an address, and elements from token to token."""

    matrix: PackedMatrix
    out: int
    out_stride: int


def _superscale_case(matrix: PackedMatrix) -> SuperscaleCase | None:
    assert matrix.option.grid is not None
    return matrix.option.grid.superscale_case(matrix.in_features)


def _pieces(matrix: PackedMatrix) -> list[tuple[int, int]]:
    """First row and end of what is multiplied at once: everything, or as many rows as scales are written out for."""
    assert matrix.option.grid is not None
    rows = matrix.out_features
    step = rows if _superscale_case(matrix) is None else matrix.option.grid.scale_rows(matrix.in_features)
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def _written_scale_bytes(matrix: PackedMatrix, num_rows: int) -> int:
    """Bytes of so many rows' scales where they must be written out, else none."""
    case = _superscale_case(matrix)
    return 0 if case is None else num_rows * case.row_bytes


def _matrices(weight: Any) -> list[tuple[PackedMatrix, slice]]:
    """The packed matrices of a parameter with their rows, in one piece each; none for a plain parameter."""
    if not isinstance(weight, PackedTensor) or any((block.rows.step or 1) != 1 for block in weight.blocks):
        return []
    return [(block.matrix, block.rows) for block in weight.blocks]


def _compiled_kernel(matrix: PackedMatrix, batch_size: int, dtype: torch.dtype) -> Matvec | None:
    """The matvec that computes this matrix for one token of each sequence; None for other kernels."""
    option = matrix.option
    fmt = None if option.grid is None else option.grid.kernel_format(matrix.in_features)
    if option.grid is None or not isinstance(fmt, PackedFormat) or option.transforms or option.corrections:
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
