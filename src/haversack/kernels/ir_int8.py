"""LLVM IR of products of many tokens in int8: packed codes times rounded activations, summed exactly in int32.

    quantize(x, workspace, tokens)                                      activations to int8, each group by its own scale
    multiply(workspace, codes, scales, zeros, out, rows, tokens)        (tokens, rows)

A thread takes a block of rows and a span of tokens. `BLOCK_COLUMNS` columns of its rows at a time are unpacked into a
panel that stays in L1, sixteen rows of four columns per vector, and multiplied with all tokens of the span, a tile of up
to six tokens by four vectors of rows in registers: `vpdpbusd`, unsigned codes times signed activations, which one
broadcast brings to all rows. After each *segment* (a group of columns, or `BLOCK_COLUMNS` of a longer one) the sums of
integers go, times both scales, to sums in float32, which stay in L2. What a code of zero stands for is taken off where
sums of integers start: `- zero * (sum of the segment's activations)`, exact in int32.

Panel and sums lie on the threads' stacks, some 110 KB, the activations in the workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from haversack.codecs.bitpack import UNIT_COLUMNS
from haversack.kernels.dot_schemes import multiply_add
from haversack.kernels.format import SCALE_BYTES, PackedFormat
from haversack.kernels.ir import Function, Module, Value, element_of, splat_constant, vector, zeros
from haversack.kernels.ir_float import bf16_of, bf16_to_float, scale_to_float
from haversack.kernels.ir_team import add_team_entry, smaller
from haversack.kernels.llvm import Target

FEATURES = ("avx512vnni", "avx512bw", "avx512f")

BLOCK_COLUMNS = 512
"""Columns of a panel: with 64 rows, 32 of L1's 48 KiB."""

ROW_VECTORS, TILE_TOKENS = 4, 6
"""Of a tile: 24 sums, four vectors of codes and a token's broadcast fill 29 of 32 registers."""

BLOCK_ROWS = 16 * ROW_VECTORS

SPAN_TOKENS = 258
"""Most tokens of a span: whole tiles, 66 KB of sums, and unpacking a panel is a fiftieth of multiplying it."""

UNROLLED = 4
"""Steps of four columns per turn of the innermost loop; segments are multiples of it."""

MOST_COLUMNS = 1 << 16
"""A token's activations in float32 lie on the stack while they are rounded."""

QUANTIZE_ARGUMENTS = [("ptr", "x"), ("ptr", "workspace"), ("i64", "tokens")]
MULTIPLY_ARGUMENTS = [
    ("ptr", "workspace"),
    ("ptr", "codes"),
    ("ptr", "scales"),
    ("ptr", "zeros"),
    ("ptr", "out"),
    ("i64", "rows"),
    ("i64", "tokens"),
]

_F16, _I16 = "<16 x float>", "<16 x i32>"


@dataclass(frozen=True)
class Int8Case:
    """One format and dtype of activations and result ("float32" or "bfloat16"); tokens and rows are arguments."""

    fmt: PackedFormat
    dtype: str
    target: Target

    @property
    def columns(self) -> int:
        """Columns that are multiplied: whole groups, or whole units where there is one group."""
        return self.fmt.unit_columns if self.fmt.num_groups == 1 else self.fmt.padded_columns

    @property
    def group_columns(self) -> int:
        return self.columns if self.fmt.num_groups == 1 else self.fmt.group_size

    @property
    def segment_columns(self) -> int:
        """Columns between two scalings; the last segment of a single group may be shorter."""
        return min(self.group_columns, BLOCK_COLUMNS)

    @property
    def num_segments(self) -> int:
        return -(-self.columns // self.segment_columns)

    @property
    def panel_segments(self) -> set[int]:
        """Segments of whole panels and of the last one, if there are."""
        full, tail = divmod(self.columns, BLOCK_COLUMNS)
        sizes = ([BLOCK_COLUMNS] if full else []) + ([tail] if tail else [])
        return {-(-size // self.segment_columns) for size in sizes}

    @property
    def size(self) -> int:
        return 4 if self.dtype == "float32" else 2

    # The workspace of a token: its activations in int8, then its segments' scales, then where sums of integers start.

    @property
    def scales_at(self) -> int:
        return self.fmt.unit_columns

    @property
    def starts_at(self) -> int:
        return self.scales_at + 4 * self.num_segments

    @property
    def token_bytes(self) -> int:
        """An odd number of lines, so that the tokens of a tile lie in different sets of a cache."""
        return (-(-(self.starts_at + 4 * self.num_segments) // 64) | 1) * 64

    def workspace_bytes(self, num_tokens: int) -> int:
        """Bytes that both entries use for `num_tokens` tokens, with 64 to align them."""
        return num_tokens * self.token_bytes + 64


def supports(fmt: PackedFormat, target: Target) -> bool:
    """Integers in one group, or in groups of 32, 64, ... up to a panel's columns, or of whole panels."""
    size = fmt.group_size
    whole = fmt.num_groups == 1 or size % BLOCK_COLUMNS == 0 or (size % 32 == 0 and BLOCK_COLUMNS % size == 0)
    return target.has(*FEATURES) and fmt.table is None and whole and fmt.unit_columns <= MOST_COLUMNS


def int8_text(case: Int8Case) -> str:
    """The whole module, entries `quantize` and `multiply`."""
    module = Module()
    _add_quantize_token(module, case)
    add_team_entry(
        module,
        "quantize",
        QUANTIZE_ARGUMENTS,
        lambda f: {"base": _aligned(f, f.arguments["workspace"]), "num_turns": f.arguments["tokens"]},
        lambda f, fields, token: _quantize_turn(f, case, fields, token),
    )
    for clamped in (False, True):
        _add_unpack(module, case, clamped=clamped)
    for segments in sorted(case.panel_segments):
        _add_scales(module, case, segments)
    for tokens in range(1, TILE_TOKENS + 1):
        _add_tile(module, case, tokens)
    _add_columns(module, case)
    _add_write(module, case)
    _add_block(module, case)
    add_team_entry(
        module, "multiply", MULTIPLY_ARGUMENTS, _multiply_fields, lambda f, v, n: _multiply_turn(f, case, v, n)
    )
    return module.text()


def _aligned(f: Function, pointer: Value) -> Value:
    address = f.cast("ptrtoint", pointer, "i64")
    return f.cast("inttoptr", f.binary("and", f.binary("add", address, 63), -64), "ptr")


# Activations


def _quantize_turn(f: Function, case: Int8Case, fields: dict[str, Value], token: Value) -> None:
    x = f.offset(fields["x"], f.times(token, case.fmt.in_features * case.size))
    f.do(f"call void @quantize_token({x}, {f.offset(fields['base'], f.times(token, case.token_bytes))})")


def _add_quantize_token(module: Module, case: Int8Case) -> None:
    """`quantize_token(x, token)`: by the rule of `ir_prepare`, scale = largest magnitude of the group / 127."""
    f = Function(module, "quantize_token", [("ptr", "x"), ("ptr", "token")])
    floats = f.value("ptr", f"alloca [{case.fmt.unit_columns} x float], align 64")
    _convert(f, case, floats)
    group_segments = -(-case.group_columns // case.segment_columns)
    scales, starts = (f.offset(f.arguments["token"], at) for at in (case.scales_at, case.starts_at))

    def group(g: Value, _: list[Value]) -> list[Value]:
        first = f.times(g, case.group_columns)
        scale, inverse = _scale_of(f, f.offset(floats, f.times(first, 4)), case.group_columns)

        def segment(s: Value, _: list[Value]) -> list[Value]:
            begin = f.binary("add", first, f.times(s, case.segment_columns))
            end = f.binary("add", first, f.times(f.binary("add", s, 1), case.segment_columns))
            end = smaller(f, end, Value("i64", str(case.columns)))
            total = f.loop(end, [zeros(_I16)], lambda i, c: _round(f, floats, inverse, i, c), first=begin, step=16)[0]
            f.module.declare("declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)")
            total = f.value("i32", f"call i32 @llvm.vector.reduce.add.v16i32({total})")
            # With zero points, only minus the sum: they are multiplied with it row by row.
            centre = 1 << (case.fmt.bits - 1) if case.fmt.symmetric else 1
            place = f.times(f.binary("add", f.times(g, group_segments), s), 4)
            f.store(f.binary("mul", total, -centre), f.offset(starts, place), 4)
            f.store(scale, f.offset(scales, place), 4)
            return []

        f.loop(group_segments, [], segment)
        return []

    f.loop(case.fmt.num_groups, [], group)
    f.end()


def _convert(f: Function, case: Int8Case, floats: Value) -> None:
    """A token's activations in float32, zeros up to whole units."""
    x, count = f.arguments["x"], case.fmt.in_features

    def copy(i: Value, lanes: int) -> list[Value]:
        source = f.offset(x, f.times(i, case.size))
        if case.dtype == "float32":
            value = f.load("float" if lanes == 1 else _F16, source, 4)
        else:
            value = bf16_to_float(f, f.load("i16" if lanes == 1 else "<16 x i16>", source, 2))
        f.store(value, f.offset(floats, f.times(i, 4)), 4)
        return []

    whole = count // 16 * 16
    f.loop(whole, [], lambda i, _: copy(i, 16), step=16)
    for start in range(whole, case.fmt.unit_columns, 16):
        f.store(zeros(_F16), f.offset(floats, 4 * start), 64)
    f.loop(count, [], lambda i, _: copy(i, 1), first=whole)


def _scale_of(f: Function, floats: Value, columns: int) -> tuple[Value, Value]:
    """A group's scale, and its inverse in sixteen lanes."""

    def widest(i: Value, carried: list[Value]) -> list[Value]:
        magnitude = f.call(_F16, "llvm.fabs.v16f32", f.load(_F16, f.offset(floats, f.times(i, 4)), 64))
        larger = f.value("<16 x i1>", f"fcmp ogt {magnitude}, {carried[0].name}")
        return [f.value(_F16, f"select {larger}, {magnitude}, {carried[0]}")]

    lanes = f.loop(columns, [zeros(_F16)], widest, step=16)[0]
    f.module.declare("declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)")
    largest = f.value("float", f"call nnan float @llvm.vector.reduce.fmax.v16f32({lanes})")
    scale = f.value("float", f"fdiv {largest}, 1.270000e+02")
    # Below this the reciprocal overflows; such a group adds nothing that a float32 sum would keep.
    tiny = f.value("i1", f"fcmp olt {largest}, 0x3A00000000000000")
    ratio = f.value("float", f"fdiv float 1.270000e+02, {largest.name}")
    return scale, f.splat(f.value("float", f"select {tiny}, float 0.0, {ratio}"), 16)


def _round(f: Function, floats: Value, inverse: Value, i: Value, carried: list[Value]) -> list[Value]:
    """Sixteen activations to int8; their sum is carried."""
    scaled = f.binary("fmul", f.load(_F16, f.offset(floats, f.times(i, 4)), 64), inverse)
    whole = f.cast("fptosi", f.call(_F16, "llvm.rint.v16f32", scaled), _I16)
    f.store(f.cast("trunc", whole, "<16 x i8>"), f.offset(f.arguments["token"], i), 16)
    return [f.binary("add", carried[0], whole)]


# Products


def _multiply_fields(f: Function) -> dict[str, Value]:
    blocks = f.binary("udiv", f.binary("add", f.arguments["rows"], BLOCK_ROWS - 1), BLOCK_ROWS)
    spans = f.binary("udiv", f.binary("add", f.arguments["tokens"], SPAN_TOKENS - 1), SPAN_TOKENS)
    base = _aligned(f, f.arguments["workspace"])
    return {"base": base, "spans": spans, "num_turns": f.binary("mul", blocks, spans)}


def _multiply_turn(f: Function, case: Int8Case, fields: dict[str, Value], number: Value) -> None:
    """One block of rows and one span of tokens; spans of one block follow each other, while its codes are cached."""
    block = f.binary("udiv", number, fields["spans"])
    span = f.binary("sub", number, f.binary("mul", block, fields["spans"]))
    begin, end = (_part(f, fields["tokens"], each, fields["spans"]) for each in (span, f.binary("add", span, 1)))
    tokens = f.offset(fields["base"], f.times(begin, case.token_bytes))
    out = f.offset(fields["out"], f.times(f.binary("mul", begin, fields["rows"]), case.size))
    given = [tokens, fields["codes"], fields["scales"], fields["zeros"], out, fields["rows"]]
    given += [f.times(block, BLOCK_ROWS), f.binary("sub", end, begin)]
    f.do(f"call void @block({', '.join(map(str, given))})")


def _part(f: Function, whole: Value, number: Value, parts: Value) -> Value:
    """Where part `number` of `parts` about equal ones begins."""
    return f.binary("udiv", f.binary("mul", whole, number), parts)


_MATRIX = [("ptr", "codes"), ("ptr", "scales"), ("ptr", "zeros")]


def _add_block(module: Module, case: Int8Case) -> None:
    """`block(tokens, codes, scales, zeros, out, rows, first, count)`: rows from `first`, `count` tokens."""
    arguments = [("ptr", "tokens"), *_MATRIX, ("ptr", "out"), ("i64", "rows"), ("i64", "first"), ("i64", "count")]
    f = Function(module, "block", arguments)
    a, fmt = f.arguments, case.fmt
    panel = f.value("ptr", f"alloca [{BLOCK_ROWS * BLOCK_COLUMNS} x i8], align 64")
    sums = f.value("ptr", f"alloca [{BLOCK_ROWS * SPAN_TOKENS} x float], align 64")
    factors = f.value("ptr", f"alloca [{BLOCK_ROWS * max(case.panel_segments)} x float], align 64")
    points = f.value("ptr", f"alloca [{BLOCK_ROWS * max(case.panel_segments)} x i32], align 64")

    def clear(i: Value, _: list[Value]) -> list[Value]:
        for r in range(ROW_VECTORS):
            f.store(zeros(_F16), f.offset(f.offset(sums, f.times(i, 4 * BLOCK_ROWS)), 64 * r), 64)
        return []

    f.loop(a["count"], [], clear)
    last = f.binary("sub", f.binary("sub", a["rows"], a["first"]), 1)  # of the rows that are there
    codes, scales, zero_points = (
        f.offset(a[name], f.times(a["first"], row_bytes))
        for (_, name), row_bytes in zip(_MATRIX, (fmt.row_bytes, fmt.scale_row_bytes, fmt.num_groups), strict=True)
    )
    given = [panel, sums, factors, points, a["tokens"], codes, last, a["count"]]

    def columns(block: Value, num_columns: int) -> list[Value]:
        segments = -(-num_columns // case.segment_columns)
        steps = min(case.segment_columns, num_columns) // 4
        units = -(-num_columns // UNIT_COLUMNS)
        group = f.binary("udiv", f.times(block, BLOCK_COLUMNS), case.group_columns)
        at = [f.offset(scales, f.times(group, SCALE_BYTES[fmt.scales])), f.offset(zero_points, group)]
        f.do(f"call void @scales{segments}({', '.join(map(str, [factors, points, *at, last]))})")
        counts = [Value("i64", str(number)) for number in (segments, steps, units)]
        f.do(f"call void @columns({', '.join(map(str, [*given, block, *counts]))})")
        return []

    full, tail = divmod(case.columns, BLOCK_COLUMNS)
    f.loop(full, [], lambda block, _: columns(block, BLOCK_COLUMNS))
    if tail:
        columns(Value("i64", str(full)), tail)
    f.do(f"call void @write({sums}, {a['out']}, {a['rows']}, {a['first']}, {a['count']})")
    f.end()


def _add_columns(module: Module, case: Int8Case) -> None:
    """`columns(...)`: unpack one panel, multiply it with every token of the span."""
    pointers = [("ptr", n) for n in ("panel", "sums", "factors", "points", "tokens", "codes")]
    numbers = [("i64", n) for n in ("last", "count", "block", "segments", "steps", "units")]
    f = Function(module, "columns", [*pointers, *numbers])
    a, fmt = f.arguments, case.fmt
    low = f.offset(a["codes"], f.times(a["block"], _panel_bytes(case)))
    for r in range(ROW_VECTORS):
        limit = f.binary("sub", a["last"], 16 * r)
        whole = f.value("i1", f"icmp sge {limit}, 15")
        panel, codes = f.offset(a["panel"], 64 * r), f.offset(low, 16 * r * fmt.row_bytes)
        listed = ", ".join(map(str, [panel, codes, a["block"], a["units"], limit]))
        f.when(whole, partial(f.do, f"call void @unpack({listed})"))
        f.when(f.binary("xor", whole, "true"), partial(f.do, f"call void @unpack_clamped({listed})"))
    segment = f.times(a["block"], BLOCK_COLUMNS // case.segment_columns)
    tiles = f.binary("udiv", f.binary("add", a["count"], TILE_TOKENS - 1), TILE_TOKENS)
    beyond = f.offset(low, _panel_bytes(case))

    def tile(i: Value, _: list[Value]) -> list[Value]:
        begin, end = (_part(f, a["count"], each, tiles) for each in (i, f.binary("add", i, 1)))
        size = f.binary("sub", end, begin)
        token = f.offset(a["tokens"], f.times(begin, case.token_bytes))
        columns = f.times(a["block"], BLOCK_COLUMNS)
        is_last = f.value("i1", f"icmp eq {end}, {a['count'].name}")
        begin_again = f.offset(f.offset(a["tokens"], columns), BLOCK_COLUMNS)
        following = f.offset(f.offset(a["tokens"], f.times(end, case.token_bytes)), columns)
        further = f.value("ptr", f"select {is_last}, {begin_again}, {following}")
        given = [a["panel"], f.offset(token, columns), further]
        given += [f.offset(f.offset(token, at), f.times(segment, 4)) for at in (case.scales_at, case.starts_at)]
        given += [a["factors"], a["points"], f.offset(a["sums"], f.times(begin, 4 * BLOCK_ROWS))]
        given += [a["segments"], a["steps"]]
        for tokens in range(TILE_TOKENS, 0, -1):
            call = partial(f.do, f"call void @tile{tokens}({', '.join(map(str, given))})")
            f.when(f.value("i1", f"icmp eq {size}, {tokens}"), call)
        edges = [_part(f, Value("i64", str(BLOCK_ROWS)), each, tiles) for each in (i, f.binary("add", i, 1))]
        f.loop(edges[1], [], lambda row, _: _ask(f, case, f.offset(beyond, f.times(row, fmt.row_bytes))), edges[0])
        return []

    f.loop(tiles, [], tile)
    f.end()


def _panel_bytes(case: Int8Case) -> int:
    """Bytes of a row's codes in a panel (at 3 bits, of the two low ones)."""
    return BLOCK_COLUMNS // UNIT_COLUMNS * _unit_bytes(case)


def _unit_bytes(case: Int8Case) -> int:
    return 16 if case.fmt.bits == 3 else 8 * case.fmt.bits


def _ask(f: Function, case: Int8Case, pointer: Value) -> list[Value]:
    """Ask for a row's codes of the next panel: short runs that a CPU sees no stream in."""
    for line in range(0, _panel_bytes(case), 64):
        _prefetch(f, f.offset(pointer, line), 2)
    return []


def _prefetch(f: Function, pointer: Value, locality: int) -> None:
    """Ask for a line, for L1 (`locality` 3) or L2 (2); never faults."""
    f.module.declare("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
    f.do(f"call void @llvm.prefetch.p0({pointer}, i32 0, i32 {locality}, i32 1)")


def _add_unpack(module: Module, case: Int8Case, *, clamped: bool) -> None:
    """`unpack(panel, codes, block, units, limit)`: sixteen rows of a panel; rows beyond `limit` repeat the last one.

    Rows are transposed by four bytes while they are packed, a quarter of a vector from each: a plane of bits of such a
    vector then is four columns of sixteen rows, whichever plane.
    """
    arguments = [("ptr", "panel"), ("ptr", "codes"), ("i64", "block"), ("i64", "units"), ("i64", "limit")]
    f = Function(module, "unpack_clamped" if clamped else "unpack", arguments)
    a, fmt = f.arguments, case.fmt
    rows = [Value("i64", str(r)) for r in range(16)]
    if clamped:
        least = f.call("i64", "llvm.smax.i64", a["limit"], Value("i64", "0"))
        # Where none of the sixteen rows is there, the row before them all is read.
        missing = smaller(f, a["limit"], Value("i64", "0"))
        rows = [f.binary("add", smaller(f, row, least), missing) for row in rows]
    offsets = [f.binary("mul", row, fmt.row_bytes) if clamped else r * fmt.row_bytes for r, row in enumerate(rows)]
    unit_bytes = _unit_bytes(case)
    high_at = fmt.unit_columns // UNIT_COLUMNS * 16
    high = f.offset(a["codes"], high_at)
    if fmt.bits == 3:  # `codes` is ahead by the low bits of `block` panels, the high bits take half of that
        high = f.offset(high, f.binary("mul", a["block"], -(_panel_bytes(case) // 2)))

    def unit(u: Value, _: list[Value]) -> list[Value]:
        low = f.offset(a["codes"], f.times(u, unit_bytes))
        panel = f.offset(a["panel"], f.times(u, UNIT_COLUMNS // 4 * 4 * BLOCK_ROWS))
        above: list[Value] = []
        if fmt.bits == 3:
            above = _transposed(f, f.offset(high, f.times(u, 8)), offsets, 2)
        for piece in range(unit_bytes // 16):
            words = _transposed(f, f.offset(low, 16 * piece), offsets, 4)
            for i, word in enumerate(words):
                for step, codes in _planes(f, case, word, 4 * piece + i, above):
                    f.store(codes, f.offset(panel, 4 * BLOCK_ROWS * step), 64)
        return []

    f.loop(a["units"], [], unit)
    f.end()


def _planes(f: Function, case: Int8Case, word: Value, number: int, above: Sequence[Value]) -> list[tuple[int, Value]]:
    """Codes of word `number` of a unit, plane by plane, each with its step: a quarter of its first column."""
    bits = case.fmt.bits
    base = 2 if bits == 3 else bits
    found = []
    for plane in range(8 // base):
        codes = word if plane == 0 else f.binary("lshr", word, splat_constant(_I16, base * plane))
        if bits < 8:
            codes = f.binary("and", codes, splat_constant(_I16, ((1 << base) - 1) * 0x01010101))
        step = plane * 2 * base + number
        if bits == 3:  # the high bit of column 4 step: bit step // 2 of the bytes of its high word step % 2
            shift = step // 2 - 2
            bit = above[step % 2]
            if shift:
                bit = f.binary("lshr" if shift > 0 else "shl", bit, splat_constant(_I16, abs(shift)))
            codes = f.binary("or", codes, f.binary("and", bit, splat_constant(_I16, 0x04040404)))
        found.append((step, codes))
    return found


def _transposed(f: Function, pointer: Value, offsets: Sequence[Value | int], words: int) -> list[Value]:
    """`words` (2 or 4) vectors: word i of sixteen rows."""
    quarters = [f.load(vector(words, "i32"), f.offset(pointer, offset)) for offset in offsets]
    if words == 2:
        quarters = [f.shuffle(q, None, [0, 1, -1, -1]) for q in quarters]
    # Lane k of vector j is row 4 k + j, so that a transposition within lanes leaves rows in order.
    mixed = []
    for j in range(4):
        halves = [f.shuffle(quarters[j + 8 * h], quarters[j + 8 * h + 4], list(range(8))) for h in range(2)]
        mixed.append(f.shuffle(halves[0], halves[1], list(range(16))))

    def within(a: Value, b: Value, picks: Sequence[int]) -> Value:
        """In each lane of four: elements of a (0 to 3) and b (4 to 7)."""
        return f.shuffle(a, b, [4 * lane + (p if p < 4 else 16 + p - 4) for lane in range(4) for p in picks])

    found = []
    for pair in ((0, 4, 1, 5), (2, 6, 3, 7))[: words // 2]:
        first, second = within(mixed[0], mixed[1], pair), within(mixed[2], mixed[3], pair)
        found += [within(first, second, half) for half in ((0, 1, 4, 5), (2, 3, 6, 7))]
    return found


def _add_scales(module: Module, case: Int8Case, segments: int) -> None:
    """`scales{segments}(factors, points, scales, zeros, last)`: a panel's scales as floats and zero points as int32, segment by
    segment the block's rows; rows beyond `last` repeat it."""
    arguments = [("ptr", n) for n in ("factors", "points", "scales", "zeros")] + [("i64", "last")]
    f = Function(module, f"scales{segments}", arguments)
    a, fmt = f.arguments, case.fmt
    element = vector(segments, "i16" if fmt.scales == "f16" else "i8")

    def row(r: Value, _: list[Value]) -> list[Value]:
        source = smaller(f, r, a["last"])
        stored = f.load(element, f.offset(a["scales"], f.times(source, fmt.scale_row_bytes)))
        spread(scale_to_float(f, stored, fmt.scales, case.target), f.offset(a["factors"], f.times(r, 4)))
        if not fmt.symmetric:
            kept = f.load(vector(segments, "i8"), f.offset(a["zeros"], f.times(source, fmt.num_groups)))
            spread(f.cast("zext", kept, vector(segments, "i32")), f.offset(a["points"], f.times(r, 4)))
        return []

    def spread(values: Value, place: Value) -> None:
        for s in range(segments):
            one = f.value(element_of(values.type), f"extractelement {values}, i32 {s}")
            f.store(one, f.offset(place, 4 * BLOCK_ROWS * s), 4)

    f.loop(BLOCK_ROWS, [], row)
    f.end()


def _add_tile(module: Module, case: Int8Case, tokens: int) -> None:
    """`tile{tokens}(...)`: so many tokens times a panel, added to their sums. The next tile's activations, at `further`, and its
    sums are asked for meanwhile."""
    names = ("panel", "tokens", "further", "scales", "starts", "factors", "points", "sums")
    f = Function(module, f"tile{tokens}", [*(("ptr", n) for n in names), ("i64", "segments"), ("i64", "steps")])
    a = f.arguments

    def products(_: Value, carried: list[Value]) -> list[Value]:
        panel, columns, further, beyond, *sums = carried
        for t in range(tokens):
            _prefetch(f, f.offset(further, t * case.token_bytes), 3)
        _prefetch(f, beyond, 3)
        for step in range(UNROLLED):
            at = f.offset(panel, 4 * BLOCK_ROWS * step)
            codes = [f.load(_I16, f.offset(at, 64 * r), 64) for r in range(ROW_VECTORS)]
            for t in range(tokens):
                four = f.splat(f.load("i32", f.offset(columns, t * case.token_bytes + 4 * step), 4), 16)
                for r in range(ROW_VECTORS):
                    place = t * ROW_VECTORS + r
                    sums[place] = f.call(_I16, "llvm.x86.avx512.vpdpbusd.512", sums[place], codes[r], four)
        moved = [f.offset(pointer, 4 * UNROLLED) for pointer in (columns, further)]
        return [f.offset(panel, 4 * BLOCK_ROWS * UNROLLED), *moved, f.offset(beyond, 64), *sums]

    def segment(s: Value, carried: list[Value]) -> list[Value]:
        at, given = f.times(s, 4 * BLOCK_ROWS), f.times(s, 4)
        begin, starts = f.offset(a["starts"], given), []
        for t in range(tokens):
            start = f.splat(f.load("i32", f.offset(begin, t * case.token_bytes), 4), 16)
            for r in range(ROW_VECTORS):
                if case.fmt.symmetric:
                    starts.append(start)
                else:
                    zero = f.load(_I16, f.offset(f.offset(a["points"], at), 64 * r), 64)
                    starts.append(f.binary("mul", start, zero))
        found = f.loop(a["steps"], [*carried, *starts], products, step=UNROLLED)
        pointers, sums = found[: len(carried)], found[len(carried) :]
        scales, factors = f.offset(a["scales"], given), f.offset(a["factors"], at)
        for t in range(tokens):
            scale = f.splat(f.load("float", f.offset(scales, t * case.token_bytes), 4), 16)
            for r in range(ROW_VECTORS):
                factor = f.binary("fmul", scale, f.load(_F16, f.offset(factors, 64 * r), 64))
                place = f.offset(a["sums"], 64 * (t * ROW_VECTORS + r))
                value = f.cast("sitofp", sums[t * ROW_VECTORS + r], _F16)
                f.store(multiply_add(f, value, factor, f.load(_F16, place, 64)), place, 64)
        return pointers

    further_sums = f.offset(a["sums"], 4 * BLOCK_ROWS * tokens)
    f.loop(a["segments"], [a["panel"], a["tokens"], a["further"], further_sums], segment)
    f.end()


def _add_write(module: Module, case: Int8Case) -> None:
    """`write(sums, out, rows, first, count)`: the sums of a span, in the result's dtype; rows that aren't there are not."""
    arguments = [("ptr", "sums"), ("ptr", "out"), ("i64", "rows"), ("i64", "first"), ("i64", "count")]
    f = Function(module, "write", arguments)
    a = f.arguments
    there = smaller(f, f.binary("sub", a["rows"], a["first"]), Value("i64", str(BLOCK_ROWS)))
    whole = f.binary("and", there, -16)

    def token(t: Value, _: list[Value]) -> list[Value]:
        sums = f.offset(a["sums"], f.times(t, 4 * BLOCK_ROWS))
        out = f.offset(a["out"], f.times(f.binary("add", f.binary("mul", t, a["rows"]), a["first"]), case.size))

        def copy(i: Value, lanes: int) -> list[Value]:
            value = f.load("float" if lanes == 1 else _F16, f.offset(sums, f.times(i, 4)), 4 * lanes)
            stored = value if case.dtype == "float32" else bf16_of(f, value, case.target)
            f.store(stored, f.offset(out, f.times(i, case.size)), case.size)
            return []

        f.loop(whole, [], lambda i, _: copy(i, 16), step=16)
        f.loop(there, [], lambda i, _: copy(i, 1), first=whole)
        return []

    f.loop(a["count"], [], token)
    f.end()
