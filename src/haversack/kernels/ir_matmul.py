"""LLVM IR of one packed matmul kernel: a format, a number of tokens, an activation dtype, an instruction set.

Everything known when a model is loaded is a constant of the code (columns, groups, tokens); rows and pointers are
arguments. Activations were laid out by `ir_prepare`; `ir_run` puts the two together. One token takes rows one after the
other, so that memory is read in the order of addresses; with more tokens several rows are computed together, so that an
activation vector is read once for all of them. Later rows are prefetched line by line, in the order of addresses.

Per row: sum over groups of scale * (sum of centred codes times activations), the inner sum in float32 (or exactly, in
int32, with 8-bit activations); zero points enter as `scale * (zero - centre) * (sum of the group's activations)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from haversack.kernels.dot_schemes import DotScheme, Operand, multiply_add
from haversack.kernels.format import PackedFormat
from haversack.kernels.ir import Function, Module, Value, splat_constant, vector, zeros
from haversack.kernels.ir_float import bf16_of, scale_to_float, sum_of_lanes
from haversack.kernels.llvm import Target

MAX_SEGMENT_CHUNKS = 8
"""Chunks unrolled between two scalings."""

PASS_BYTES = 64 << 10
"""Bytes of packed rows that all rounds of tokens go over before the next rows are read: they stay in L2 meanwhile. Each
change of round brings other activations to L1: 8 tokens at 4 bits took 20% longer with 16 KiB."""

PREFETCH_BYTES = 8 << 10
"""The same for one round: how far ahead codes are asked for, in whole blocks of rows. Without, four rows abreast reach 17 of the 41 GB/s that a
plain read does here, and one row alone 31; with it 32 and 35. 4 and 16 KiB are within 5% of 8."""

L1_BYTES = 48 << 10
"""First-level data cache: what one round's activations should fit in."""

SCALE_PREFETCH_ROWS = 16
"""Rows ahead that scales are asked for. They come line by line, too slowly for a CPU to see a stream in them: without
this each block of rows waits for memory once more."""


@dataclass(frozen=True)
class MatmulCase:
    """One kernel: `tokens` per round, and what `run` is generated for."""

    fmt: PackedFormat
    tokens: int
    dtype: str  # "float32" or "bfloat16", of activations and result
    scheme: DotScheme
    target: Target
    rounds: int = 1
    """Rounds of tokens that share the asking for later rows: 1, 2, or 4 for more."""

    @property
    def terms(self) -> int:
        """bfloat16 terms per activation: float32 is the sum of two, up to 2^-17 of it."""
        return 2 if self.scheme.activation_element == "bfloat" and self.dtype == "float32" else 1

    @property
    def num_units(self) -> int:
        return self.fmt.unit_columns // 64

    @property
    def num_chunks(self) -> int:
        return -(-self.num_units // self.scheme.chunk_units)

    @property
    def whole_row(self) -> bool:
        return self.fmt.num_groups == 1

    @property
    def chunk_groups(self) -> int:
        """Groups that share a chunk; 1 where groups are as long or longer."""
        return 1 if self.whole_row else max(1, self.scheme.chunk_columns // self.fmt.group_size)

    @property
    def segment_chunks(self) -> int:
        """Chunks between two scalings."""
        return 1 if self.whole_row else max(1, self.fmt.group_size // self.scheme.chunk_columns)

    @property
    def num_segments(self) -> int:
        return 1 if self.whole_row else -(-self.num_chunks // self.segment_chunks)

    @property
    def padded_groups(self) -> int:
        return -(-self.fmt.num_groups // 16) * 16

    @property
    def block_rows(self) -> int:
        """Rows computed together. One token: one row, 0.92 of a plain read at 4 bits where four rows abreast reach 0.83;
        at 2 bits, which computing bounds, two: 0.74 to 0.68. More tokens: as many as leave registers for sums; four rows
        of four tokens, with sums in memory, are no faster than two until the activations leave L1: then they are read for
        twice as many rows. 8 tokens, one thread, cycles per dot product with two and with four rows: 0.78 and 0.86 at 4,096
        columns, 0.89 and 0.94 at 5,632, 1.43 and 0.91 at 8,192, 1.30 and 0.97 at 14,336.
        """
        if self.tokens == 1:
            return 2 if self.fmt.bits == 2 else 1
        return 4 if self.tokens == 2 or self.activation_bytes > L1_BYTES else 2

    @property
    def pass_rows(self) -> int:
        """Rows that all rounds of tokens go over before the next rows."""
        wanted = PREFETCH_BYTES if self.rounds == 1 else PASS_BYTES
        return max(1, round(wanted / (self.block_rows * self.fmt.row_bytes))) * self.block_rows

    def asked_bytes(self, num_rows: int) -> int:
        """Bytes of later rows that one chunk of a block asks for: its share of as many rows, or of a round's part."""
        share = num_rows * -(-self.fmt.row_bytes // self.num_chunks)
        return share if self.rounds == 1 else -(-share // (64 * self.rounds)) * 64

    def asked_block_bytes(self, num_rows: int) -> int:
        """The same for the whole block."""
        whole = num_rows * self.fmt.row_bytes
        return whole if self.rounds == 1 else self.num_chunks * self.asked_bytes(num_rows)

    @property
    def lane_groups(self) -> list[tuple[int, ...]]:
        """Per activation vector of a chunk, the group (within the chunk) that each of the sixteen lanes belongs to."""
        if self.chunk_groups == 1:
            return [(0,) * 16] * len(self.scheme.activation_columns)
        return [
            tuple(columns[lane * len(columns) // 16] // self.fmt.group_size for lane in range(16))
            for columns in self.scheme.activation_columns
        ]

    # The workspace of one round: activations, start values and scales of int8 activations, group sums; one float32 row.

    @property
    def vector_bytes(self) -> int:
        """Bytes of one activation vector (all its terms are separate vectors)."""
        size = {"bfloat": 2, "float": 4, "i8": 1}[self.scheme.activation_element]
        return size * len(self.scheme.activation_columns[0])

    @property
    def activation_bytes(self) -> int:
        vectors = self.num_chunks * len(self.scheme.activation_columns)
        return vectors * self.tokens * self.terms * self.vector_bytes

    @property
    def start_bytes(self) -> int:
        """Per segment and token, sixteen start values, if the scheme has offsets."""
        return 0 if self.scheme.offsets() is None else self.num_segments * self.tokens * 64

    @property
    def scale_bytes(self) -> int:
        """Per token and group, the scale of int8 activations."""
        return self.tokens * self.padded_groups * 4 if self.scheme.activation_bits == 8 else 0

    @property
    def sum_bytes(self) -> int:
        """Per token and group, the sum of the activations, where there are zero points."""
        return 0 if self.fmt.symmetric else self.tokens * self.padded_groups * 4

    @property
    def scales_at(self) -> int:
        return self.activation_bytes + self.start_bytes

    @property
    def sums_at(self) -> int:
        return self.scales_at + self.scale_bytes

    @property
    def round_bytes(self) -> int:
        return self.sums_at + self.sum_bytes

    @property
    def scratch_bytes(self) -> int:
        """One token's activations in float32, in order, padded to whole chunks."""
        return self.num_chunks * self.scheme.chunk_columns * 4

    def workspace_bytes(self, num_tokens: int) -> int:
        """Bytes that `run` uses for `num_tokens` tokens, with 64 to align it."""
        return -(-num_tokens // self.tokens) * self.round_bytes + self.scratch_bytes + 64


def supports(fmt: PackedFormat, scheme: DotScheme) -> bool:
    """Groups are whole chunks or an even part of one; smaller than a unit only for floats without offsets."""
    if fmt.num_groups == 1:
        return True
    if fmt.group_size % 64:
        even = fmt.group_size in (16, 32) and scheme.chunk_columns // fmt.group_size <= 16
        return even and scheme.activation_bits == 16 and scheme.offsets() is None
    units, chunk = fmt.group_size // 64, scheme.chunk_units
    return chunk % units == 0 or (units % chunk == 0 and units // chunk <= MAX_SEGMENT_CHUNKS)


def add_rows(module: Module, case: MatmulCase) -> None:
    """`rows(round, codes, scales, zeros, out, stride, valid, ask, first, last)`: those rows, for one round of tokens.

    `out` is that of the round's first token; `stride` the elements between tokens; `valid` the tokens to write; `ask`
    where later rows are asked for.
    """
    _add_block(module, case, case.block_rows)
    if case.block_rows > 1:
        _add_block(module, case, 1)
    f = Function(module, "rows", [*_BLOCK_ARGUMENTS, ("i64", "last")])
    first, last = f.arguments["first"], f.arguments["last"]

    def call(rows: int, row: Value, ask: Value) -> None:
        given = f.arguments | {"first": row, "ask": ask}
        f.do(f"call void @block{rows}({', '.join(str(given[name]) for _, name in _BLOCK_ARGUMENTS)})")

    step = case.block_rows

    def block(row: Value, carried: list[Value]) -> Sequence[Value]:
        call(step, row, carried[0])
        return [f.offset(carried[0], case.asked_block_bytes(step))]

    ask = f.loop(f.binary("sub", last, step - 1), [f.arguments["ask"]], block, first=first, step=step)[0]
    if step > 1:
        rest = f.binary("add", first, f.binary("and", f.binary("sub", last, first), -step))

        def single(row: Value, _: list[Value]) -> Sequence[Value]:
            call(1, row, ask)
            return []

        f.loop(last, [], single, first=rest)
    f.end()


_BLOCK_ARGUMENTS = [
    ("ptr", "round"),
    ("ptr", "codes"),
    ("ptr", "scales"),
    ("ptr", "zeros"),
    ("ptr", "out"),
    ("i64", "stride"),
    ("i64", "valid"),
    ("ptr", "ask"),
    ("i64", "first"),
]


def _add_block(module: Module, case: MatmulCase, num_rows: int) -> None:
    """`block{num_rows}`: that many rows from `first`."""
    f = Function(module, f"block{num_rows}", _BLOCK_ARGUMENTS)
    block = _Block(f, case, num_rows)
    sums = _sum_of_segments(block)
    if not case.fmt.symmetric:
        sums = _take_zeros(f, case, sums, block.rows, block.floats)
    for r in range(num_rows):
        for t in range(case.tokens):
            _store(f, case, sums[r * case.tokens + t], block.rows[r], t)
    f.end()


class _Block:
    """A block of rows while it is written: where its rows' codes and scales lie, and how many sums it keeps.

    Accumulators are ordered row, token, set, chain; sums row, token.
    """

    def __init__(self, f: Function, case: MatmulCase, num_rows: int):
        self.f, self.case, self.num_rows = f, case, num_rows
        fmt, arguments = case.fmt, f.arguments
        self.rows = [f.binary("add nuw nsw", arguments["first"], r) for r in range(num_rows)]
        self.codes = [f.offset(arguments["codes"], f.times(row, fmt.row_bytes)) for row in self.rows]
        scales = [f.offset(arguments["scales"], f.times(row, fmt.scale_row_bytes)) for row in self.rows]
        low_bytes = case.num_units * case.scheme.unit_bytes
        self.high = [f.offset(pointer, low_bytes) for pointer in self.codes] if fmt.bits == 3 else None
        # Activation vectors whose lanes belong to the same groups are summed together.
        self.sets = list(dict.fromkeys(case.lane_groups))
        # Two sums per row and token where registers allow: one chain of dependent dot products would set the pace.
        self.chains = 2 if num_rows * case.tokens * len(self.sets) <= 4 else 1
        self.starts = f.offset(arguments["round"], case.activation_bytes)
        _prefetch_scales(f, case, scales[0], num_rows)
        self.floats = [_scales_as_floats(f, case, pointer) for pointer in scales]
        # What a row's sums are multiplied with, per row and token: its scales, times the token's if it is quantized.
        self.factors = [_factors(f, case, pointer, t) for pointer in self.floats for t in range(case.tokens)]

    def start(self, segment: Value | int) -> list[Value]:
        """Accumulators of a segment before its first chunk."""
        f, case, scheme = self.f, self.case, self.case.scheme
        if scheme.offsets() is None:
            return [zeros(scheme.accumulator)] * (self.num_rows * case.tokens * len(self.sets) * self.chains)
        per_token = []
        for t in range(case.tokens):
            per_token.append(f.load(scheme.accumulator, _start_pointer(f, case, self.starts, segment, t), 64))
            per_token += [zeros(scheme.accumulator)] * (self.chains - 1)
        return per_token * self.num_rows

    def dots(self, accumulators: list[Value], chunk: Value | int, units: int) -> list[Value]:
        """Accumulators plus the products of one chunk of so many units."""
        f, case, scheme = self.f, self.case, self.case.scheme
        accumulators = list(accumulators)
        _prefetch_codes(f, case, chunk, self.num_rows)
        operands = self._operands(chunk, units)
        chunk_bytes = len(scheme.activation_columns) * case.tokens * case.terms * case.vector_bytes
        vectors = f.offset(f.arguments["round"], f.times(chunk, chunk_bytes))
        type_ = vector(len(scheme.activation_columns[0]), scheme.activation_element)
        align = 64 if case.vector_bytes == 64 else 16
        for number, of_rows in enumerate(zip(*operands, strict=True)):
            activations = of_rows[0].activations
            part = self.sets.index(case.lane_groups[activations])
            for t in range(case.tokens):
                for term in range(case.terms):
                    place = (activations * case.tokens + t) * case.terms + term
                    x = f.load(type_, f.offset(vectors, place * case.vector_bytes), align)
                    for r in range(self.num_rows):
                        slot = (r * case.tokens + t) * len(self.sets) + part
                        slot = slot * self.chains + (number + term) % self.chains
                        accumulators[slot] = scheme.dot(f, accumulators[slot], of_rows[r].weights, x)
        return accumulators

    def _operands(self, chunk: Value | int, units: int) -> list[list[Operand]]:
        """Weights of a chunk, row by row."""
        f, scheme = self.f, self.case.scheme
        low_at = f.times(chunk, scheme.chunk_bytes)
        found = []
        for r in range(self.num_rows):
            low, above = f.offset(self.codes[r], low_at), None
            if self.high is not None:
                above = f.offset(self.high[r], f.times(chunk, 8 * scheme.chunk_units))
            found.append(scheme.operands(f, low, above, units))
        return found

    def scaled(self, sums: list[Value], accumulators: list[Value], segment: Value | int, groups: int) -> list[Value]:
        """Sums plus a segment's accumulators times the scales of its `groups` groups."""
        f, case, scheme = self.f, self.case, self.case.scheme
        floats = scheme.accumulator == "<16 x float>"
        offset = f.times(segment, 4 * case.chunk_groups)
        result = []
        for slot, total in enumerate(sums):
            for part, lane_groups in enumerate(self.sets):
                first = (slot * len(self.sets) + part) * self.chains
                inner = accumulators[first]
                for other in accumulators[first + 1 : first + self.chains]:
                    inner = f.binary("fadd" if floats else "add", inner, other)
                if not floats:
                    inner = f.cast("sitofp", inner, "<16 x float>")
                factor = _lane_factors(f, f.offset(self.factors[slot], offset), lane_groups, groups)
                total = multiply_add(f, inner, factor, total)
            result.append(total)
        return result


def _sum_of_segments(block: _Block) -> list[Value]:
    """Sums of a block's whole rows, sixteen lanes each: chunks into accumulators, scaled once per segment."""
    f, case = block.f, block.case
    units = case.scheme.chunk_units
    full_chunks, tail_units = divmod(case.num_units, units)
    sums = [zeros("<16 x float>")] * (block.num_rows * case.tokens)
    if case.whole_row:
        accumulators = f.loop(full_chunks, block.start(0), lambda c, carried: block.dots(carried, c, units))
        if tail_units:
            accumulators = block.dots(accumulators, full_chunks, tail_units)
        return block.scaled(sums, accumulators, 0, 1)

    def segment(s: Value, carried: list[Value]) -> list[Value]:
        accumulators = block.start(s)
        first = f.times(s, case.segment_chunks)
        for c in range(case.segment_chunks):
            chunk = f.binary("add nuw nsw", first, c) if c else first
            accumulators = block.dots(accumulators, chunk, units)
        return block.scaled(carried, accumulators, s, case.chunk_groups)

    full_segments = full_chunks // case.segment_chunks
    sums = f.loop(full_segments, sums, segment)
    if tail_units:
        accumulators = block.dots(block.start(full_segments), full_chunks, tail_units)
        sums = block.scaled(sums, accumulators, full_segments, max(1, tail_units * 64 // case.fmt.group_size))
    return sums


def _start_pointer(f: Function, case: MatmulCase, starts: Value, segment: Value | int, token: int) -> Value:
    step = 64 * case.tokens
    at = f.times(segment, step)
    return f.offset(f.offset(starts, at), 64 * token)


def _scales_as_floats(f: Function, case: MatmulCase, scales: Value) -> Value:
    """One row's scales in float32, on the stack: converted sixteen at a time, which a chunk's own would not fill."""
    fmt = case.fmt
    element, size = ("i16", 2) if fmt.scales == "f16" else ("i8", 1)
    floats = f.value("ptr", f"alloca [{case.padded_groups} x float], align 64")

    def convert(group: Value | int, width: int) -> list[Value]:
        at = f.times(group, size)
        stored = _widened(f, f.load(vector(width, element), f.offset(scales, at), size))
        place = f.offset(floats, f.times(group, 4))
        f.store(scale_to_float(f, stored, fmt.scales, case.target), place, 64)
        return []

    full = fmt.num_groups // 16 * 16
    f.loop(full, [], lambda group, _: convert(group, 16), step=16)
    if fmt.num_groups > full:
        convert(full, fmt.num_groups - full)
    return floats


def _factors(f: Function, case: MatmulCase, floats: Value, token: int) -> Value:
    """Per group of a row: its scale, or its scale times that of the token's int8 activations."""
    if case.scheme.activation_bits == 16:
        return floats
    given = f.offset(f.arguments["round"], case.scales_at + 4 * case.padded_groups * token)
    factors = f.value("ptr", f"alloca [{case.padded_groups} x float], align 64")

    def multiply(at: Value, _: list[Value]) -> list[Value]:
        both = [f.load("<16 x float>", f.offset(pointer, at), 64) for pointer in (floats, given)]
        f.store(f.binary("fmul", *both), f.offset(factors, at), 64)
        return []

    f.loop(4 * case.padded_groups, [], multiply, step=64)
    return factors


def _lane_factors(f: Function, pointer: Value, lane_groups: tuple[int, ...], groups: int) -> Value:
    """Sixteen factors, lane by lane, from those of a segment's `groups` groups."""
    if groups == 1:
        return f.splat(f.load("float", pointer, 4), 16)
    return f.shuffle(f.load(vector(groups, "float"), pointer, 4), None, [min(g, groups - 1) for g in lane_groups])


def _take_zeros(
    f: Function, case: MatmulCase, sums: list[Value], rows: list[Value], scales: list[Value]
) -> list[Value]:
    """Take `scale * (zero - centre) * (sum of the group's activations)` off, sixteen groups at a time."""
    fmt = case.fmt
    zero_rows = [f.offset(f.arguments["zeros"], f.times(row, fmt.num_groups)) for row in rows]
    group_sums = f.offset(f.arguments["round"], case.sums_at)
    centre = splat_constant("<16 x float>", f"{float(1 << (fmt.bits - 1)):e}")

    def step(group: Value | int, carried: list[Value], width: int) -> list[Value]:
        result = list(carried)
        at = f.times(group, 4)
        for r in range(len(rows)):
            zero = _widened(f, f.load(vector(width, "i8"), f.offset(zero_rows[r], group)))
            zero = f.cast("uitofp", f.cast("zext", zero, "<16 x i32>"), "<16 x float>")
            scale = f.load("<16 x float>", f.offset(scales[r], at), 64)
            factor = f.binary("fmul", scale, f.binary("fsub", centre, zero))
            for t in range(case.tokens):
                base = f.offset(group_sums, 4 * case.padded_groups * t)
                slot = r * case.tokens + t
                result[slot] = multiply_add(f, factor, f.load("<16 x float>", f.offset(base, at)), result[slot])
        return result

    full = fmt.num_groups // 16 * 16
    sums = f.loop(full, sums, lambda group, carried: step(group, carried, 16), step=16)
    return step(full, sums, fmt.num_groups - full) if fmt.num_groups > full else sums


def _widened(f: Function, a: Value) -> Value:
    """Sixteen elements, zero beyond those there are."""
    width = int(a.type[1 : a.type.index(" ")])
    return a if width == 16 else f.shuffle(a, zeros(a.type), [min(i, width) for i in range(16)])


def _store(f: Function, case: MatmulCase, lanes: Value, row: Value, token: int) -> None:
    """Sum the lanes and write the element of one row and token, unless the token is padding of the round."""
    total = sum_of_lanes(f, lanes)
    size = 4 if case.dtype == "float32" else 2
    element = total if case.dtype == "float32" else bf16_of(f, total, case.target)

    def write() -> None:
        place = f.binary("add", f.binary("mul", f.arguments["stride"], token), row)
        f.store(element, f.offset(f.arguments["out"], f.times(place, size)), size)

    if token == 0:
        write()
    else:
        f.when(f.value("i1", f"icmp sgt {f.arguments['valid']}, {token}"), write)


def _prefetch_codes(f: Function, case: MatmulCase, chunk: Value | int, num_rows: int) -> None:
    """Ask for one chunk's share of later rows, in the order of addresses."""
    share = case.asked_bytes(num_rows)
    at = f.offset(f.arguments["ask"], f.times(chunk, share))
    for line in range(0, share, 64):
        _prefetch(f, case, f.offset(at, line))


def _prefetch_scales(f: Function, case: MatmulCase, block: Value, num_rows: int) -> None:
    """Ask for the scales of a later block of rows, which follow each other without a gap."""
    row_bytes = case.fmt.scale_row_bytes
    for line in range(0, num_rows * row_bytes, 64):
        _prefetch(f, case, f.offset(block, SCALE_PREFETCH_ROWS * row_bytes + line))


def _prefetch(f: Function, case: MatmulCase, pointer: Value) -> None:
    """Ask for a line; never faults. In one round it is read once and need not stay in L2."""
    f.module.declare("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
    f.do(f"call void @llvm.prefetch.p0({pointer}, i32 0, i32 {0 if case.rounds == 1 else 2}, i32 1)")
