"""LLVM IR of packed rows times many tokens: rows are dequantized into panels that stay in a thread's cache, and multiplied there.

    arrange(x, arranged, tokens, parallel, threads)
    run(arranged, scratch, codes, scales, zeros, out, rows, tokens, parallel, threads)

bfloat16 in and out, products summed in float32 (vdpbf16ps). `arrange` lays blocks of `BLOCK_TOKENS` tokens out by pairs of
columns, so that a step of the inner loop reads one pair of every token side by side; padding is zeros. `run` takes turns of
some panels of `PANEL_ROWS` rows: each is dequantized into `scratch` (`thread_bytes` for each thread), pair by pair as well, and then
every block of tokens passes over it with all its sums in registers: 24 of 32, since a dot product answers after several others.
Long rows are cut into stretches of `STRETCH_COLUMNS`, between which sums lie in memory.

The order of loops is that of Goto and van de Geijn 2008 ("Anatomy of High-Performance Matrix Multiplication"), stretches outermost
within a turn.
"""

from __future__ import annotations

from dataclasses import dataclass

from haversack.kernels import ir_dequantize
from haversack.kernels.format import PackedFormat
from haversack.kernels.ir import Function, Module, Value, constant, vector, zeros
from haversack.kernels.ir_float import bf16_of
from haversack.kernels.ir_team import add_team_entry, smaller
from haversack.kernels.llvm import Target

BLOCK_TOKENS, PANEL_ROWS = 12, 32
"""Tokens and rows of one block of sums: 24 vectors of sixteen."""

STRETCH_COLUMNS = 2048
"""Columns of a panel: 128 KiB."""

TURN_PANELS = 2
"""Panels of one turn: they stay in the second-level cache, and each block of tokens is fetched once for all of them."""

PREFETCH_BYTES = 4 << 10
"""How far ahead arranged tokens are asked for: they lie one block after the other."""

PIECE_UNITS = 2
"""Units of 64 columns that are dequantized at a time, for sixteen rows: 4 KiB on the stack."""

ARRANGE_ARGUMENTS = [("ptr", "x"), ("ptr", "arranged"), ("i64", "tokens")]
RUN_ARGUMENTS = [
    ("ptr", "arranged"),
    ("ptr", "scratch"),
    ("ptr", "codes"),
    ("ptr", "scales"),
    ("ptr", "zeros"),
    ("ptr", "out"),
    ("i64", "rows"),
    ("i64", "tokens"),
]

_LANES = 16
_PAIRS = vector(_LANES, "i32")
_TERMS = "<32 x bfloat>"
_SUMS = vector(_LANES, "float")


@dataclass(frozen=True)
class PanelCase:
    """One kernel: a format, for CPUs with dot products of bfloat16."""

    fmt: PackedFormat
    target: Target

    @property
    def columns(self) -> int:
        """With the padding to whole units."""
        return self.fmt.unit_columns

    @property
    def block_bytes(self) -> int:
        """One block of tokens as it is arranged."""
        return 2 * BLOCK_TOKENS * self.columns

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """First column and end of each."""
        return [
            (first, min(first + STRETCH_COLUMNS, self.columns)) for first in range(0, self.columns, STRETCH_COLUMNS)
        ]

    @property
    def panel_bytes(self) -> int:
        """One panel of one stretch."""
        return 2 * PANEL_ROWS * min(self.columns, STRETCH_COLUMNS)

    def thread_bytes(self, num_tokens: int) -> int:
        """What each thread writes to: the panels of a turn and, between stretches, all tokens' sums."""
        sums = 4 * TURN_PANELS * PANEL_ROWS * BLOCK_TOKENS * num_blocks(num_tokens) if len(self.stretches) > 1 else 0
        return TURN_PANELS * self.panel_bytes + sums

    def arranged_bytes(self, num_tokens: int) -> int:
        return num_blocks(num_tokens) * self.block_bytes

    def num_turns(self, num_rows: int) -> int:
        return -(-num_rows // (TURN_PANELS * PANEL_ROWS))


def num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


def supports(fmt: PackedFormat, target: Target) -> bool:
    """CPUs that multiply bfloat16 by vectors, but not by tiles of their own."""
    by_vectors = target.has("avx512bf16", "avx512bw", "avx512f") and not target.has("amx-bf16")
    return by_vectors and ir_dequantize.supports(fmt)


def panels_text(case: PanelCase) -> str:
    """The whole module, entries `arrange` and `run`."""
    module = Module()
    ir_dequantize.add_units(module, case.fmt, "bfloat16", case.target)
    add_team_entry(
        module,
        "arrange",
        ARRANGE_ARGUMENTS,
        lambda f: {"num_turns": _divided(f, f.arguments["tokens"], BLOCK_TOKENS)},
        lambda f, at, number: _arrange_block(f, case, at, number),
    )
    _add_fill(module, case)
    kinds = {(number == 0, number == len(case.stretches) - 1) for number in range(len(case.stretches))}
    for is_first, is_last in sorted(kinds):
        _add_multiply(module, case, is_first, is_last)
    add_team_entry(
        module,
        "run",
        RUN_ARGUMENTS,
        lambda f: {"num_turns": _divided(f, f.arguments["rows"], TURN_PANELS * PANEL_ROWS)},
        lambda f, at, number: _turn(f, case, at, number),
        own_slots=True,
    )
    return module.text()


def _divided(f: Function, a: Value, by: int) -> Value:
    """Rounded up."""
    return f.binary("udiv", f.binary("add", a, by - 1), by)


def _arrange_block(f: Function, case: PanelCase, at: dict[str, Value], number: Value) -> None:
    """One block of tokens, by sixteen pairs of columns."""
    row_bytes = 2 * case.fmt.in_features
    first = f.times(number, BLOCK_TOKENS)
    tokens = [f.binary("add", first, t) for t in range(BLOCK_TOKENS)]
    there = [f.value("i1", f"icmp slt {token}, {at['tokens'].name}") for token in tokens]
    sources = [f.offset(at["x"], f.times(token, row_bytes)) for token in tokens]
    words, lanes = vector(2 * _LANES, "i16"), range(2 * _LANES)

    def chunk(c: Value | int, width: int, target: Value) -> list[Value]:
        """Sixteen pairs, of which `width` columns are there."""
        place = f.times(c, 4 * _LANES)
        rows = []
        for source, real in zip(sources, there, strict=True):
            inside = constant("i1", ["true" if lane < width else "false" for lane in lanes])
            mask = f.value(inside.type, f"select {real}, {inside}, {inside.type} zeroinitializer")
            type_ = "<32 x i16> @llvm.masked.load.v32i16.p0"
            f.module.declare(f"declare {type_}(ptr, i32, <32 x i1>, <32 x i16>)")
            given = f"{f.offset(source, place)}, i32 2, {mask}, {words} zeroinitializer"
            rows.append(f.cast("bitcast", f.value(words, f"call {type_}({given})"), _PAIRS))
        for pair, column in enumerate(_transposed(f, rows)):
            some = f.shuffle(column, None, range(BLOCK_TOKENS))
            f.store(some, f.offset(target, 4 * BLOCK_TOKENS * pair), 4)
        return []

    chunk_bytes = 4 * _LANES * BLOCK_TOKENS
    for start, stop in case.stretches:
        first_chunk, end = start // (2 * _LANES), stop // (2 * _LANES)
        whole = min(end, case.fmt.in_features // (2 * _LANES))
        out = f.offset(_stretch(f, case, at, start), f.times(number, 2 * BLOCK_TOKENS * (stop - start)))

        def place(c: Value | int, out: Value = out, first_chunk: int = first_chunk) -> Value:
            since = c - first_chunk if isinstance(c, int) else f.binary("sub", c, first_chunk)
            return f.offset(out, f.times(since, chunk_bytes))

        f.loop(whole, [], lambda c, _, place=place: chunk(c, 2 * _LANES, place(c)), first=first_chunk)  # type: ignore[misc]
        for c in range(max(whole, first_chunk), end):
            chunk(c, max(0, case.fmt.in_features - 2 * _LANES * c), place(c))


def _stretch(f: Function, case: PanelCase, at: dict[str, Value], first_column: int) -> Value:
    """Where the stretch that begins at a column lies among the arranged tokens: all blocks of it side by side."""
    return f.offset(at["arranged"], f.times(_divided(f, at["tokens"], BLOCK_TOKENS), 2 * BLOCK_TOKENS * first_column))


def _transposed(f: Function, rows: list[Value]) -> list[Value]:
    """Sixteen vectors of sixteen, of which `rows` are the first (others zero), seen by columns."""
    vectors = [*rows, *[zeros(_PAIRS)] * (_LANES - len(rows))]
    for step in (8, 4, 2, 1):  # exchange off-diagonal squares of ever smaller halves
        mixed = list(vectors)
        for i in range(_LANES):
            if i & step:
                continue
            upper, lower = vectors[i], vectors[i + step]
            lanes = range(_LANES)
            mixed[i] = f.shuffle(upper, lower, [lane if not lane & step else _LANES + lane - step for lane in lanes])
            mixed[i + step] = f.shuffle(
                upper, lower, [lane + step if not lane & step else _LANES + lane for lane in lanes]
            )
        vectors = mixed
    return vectors


def _add_fill(module: Module, case: PanelCase) -> None:
    """`fill(codes, scales, zeros, panel, first, last, unit, end)`: one panel of rows from `first` on; beyond row `last` that one
    again. Its columns are those of units `unit` to `end`."""
    fmt = case.fmt
    pointers = [("ptr", "codes"), ("ptr", "scales"), ("ptr", "zeros"), ("ptr", "panel")]
    arguments = [*pointers, ("i64", "first"), ("i64", "last"), ("i64", "unit"), ("i64", "end")]
    f = Function(module, "fill", arguments)
    a = f.arguments
    piece_bytes = 2 * 64 * PIECE_UNITS
    rows = f.value("ptr", f"alloca [{_LANES * piece_bytes} x i8], align 64")

    def sixteen(first: Value, _: list[Value]) -> list[Value]:
        column = f.times(f.binary("sub", first, a["first"]), 4)

        def piece(u: Value, _: list[Value]) -> list[Value]:
            end = smaller(f, f.binary("add", u, PIECE_UNITS), a["end"])

            def dequantize(r: Value, _: list[Value]) -> list[Value]:
                row = smaller(f, f.binary("add", first, r), a["last"])
                codes = f.offset(a["codes"], f.times(row, fmt.row_bytes))
                scales = f.offset(a["scales"], f.times(row, fmt.scale_row_bytes))
                zero_points = f.offset(a["zeros"], f.times(row, fmt.num_groups))
                place = f.offset(rows, f.times(r, piece_bytes))
                f.do(f"call void @units({codes}, {scales}, {zero_points}, {place}, {u}, {end})")
                return []

            f.loop(_LANES, [], dequantize)
            written = f.times(f.binary("sub", u, a["unit"]), 32 * 4 * PANEL_ROWS)
            target = f.offset(f.offset(a["panel"], written), column)

            def square(s: Value, _: list[Value]) -> list[Value]:
                lines = [
                    f.load(_PAIRS, f.offset(rows, f.binary("add", f.times(s, 64), r * piece_bytes)), 64)
                    for r in range(_LANES)
                ]
                place = f.offset(target, f.times(s, _LANES * 4 * PANEL_ROWS))
                for pair, values in enumerate(_transposed(f, lines)):
                    f.store(values, f.offset(place, 4 * PANEL_ROWS * pair), 64)
                return []

            f.loop(f.times(f.binary("sub", end, u), 2), [], square)
            return []

        f.loop(a["end"], [], piece, first=a["unit"], step=PIECE_UNITS)
        return []

    f.loop(f.binary("add", a["first"], PANEL_ROWS), [], sixteen, first=a["first"], step=_LANES)
    f.end()


def _multiply_name(is_first: bool, is_last: bool) -> str:
    return f"multiply{'_first' * is_first}{'_last' * is_last}"


def _add_multiply(module: Module, case: PanelCase, is_first: bool, is_last: bool) -> None:
    """`multiply(block, panel, sums, pairs, out, stride, tokens, rows)`: a block of tokens times a panel, of so many pairs of columns.

    Sums go on from those in memory, but for the first stretch, and go back there, but for the last: of its result `tokens` and
    `rows` are written to `out`.
    """
    pointers = [("ptr", "block"), ("ptr", "panel"), ("ptr", "sums"), ("ptr", "out")]
    numbers = [("i64", "pairs"), ("i64", "stride"), ("i64", "tokens"), ("i64", "rows")]
    f = Function(module, _multiply_name(is_first, is_last), [*pointers, *numbers])
    f.module.declare("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
    a, across = f.arguments, PANEL_ROWS // _LANES
    dot = "llvm.x86.avx512bf16.dpbf16ps.512"

    def pair(p: Value, sums: list[Value]) -> list[Value]:
        weights_at = f.offset(a["panel"], f.times(p, 4 * PANEL_ROWS))
        weights = [f.cast("bitcast", f.load(_PAIRS, f.offset(weights_at, 64 * n), 64), _TERMS) for n in range(across)]
        tokens_at = f.offset(a["block"], f.times(p, 4 * BLOCK_TOKENS))
        f.do(f"call void @llvm.prefetch.p0({f.offset(tokens_at, PREFETCH_BYTES)}, i32 0, i32 3, i32 1)")
        result = []
        for t in range(BLOCK_TOKENS):
            x = f.cast("bitcast", f.splat(f.load("i32", f.offset(tokens_at, 4 * t), 4), _LANES), _TERMS)
            result += [f.call(_SUMS, dot, sums[t * across + n], weights[n], x) for n in range(across)]
        return result

    places = [f.offset(a["sums"], 64 * i) for i in range(BLOCK_TOKENS * across)]
    sums = [zeros(_SUMS) if is_first else f.load(_SUMS, place, 64) for place in places]
    sums = f.loop(a["pairs"], sums, pair)
    if is_last:
        _write(f, case, sums)
    else:
        for place, value in zip(places, sums, strict=True):
            f.store(value, place, 64)
    f.end()


def _write(f: Function, case: PanelCase, sums: list[Value]) -> None:
    """A block's sums, rounded, to the tokens and rows that are there."""
    a, across = f.arguments, PANEL_ROWS // _LANES
    inside = []
    for n in range(across):
        lanes = constant("i64", [_LANES * n + lane for lane in range(_LANES)])
        inside.append(f.value("<16 x i1>", f"icmp slt {lanes}, {f.splat(a['rows'], _LANES).name}"))
    f.module.declare("declare void @llvm.masked.store.v16i16.p0(<16 x i16>, ptr, i32, <16 x i1>)")
    for t in range(BLOCK_TOKENS):

        def token(t: int = t) -> None:
            place = f.offset(a["out"], f.times(a["stride"], 2 * t))
            for n in range(across):
                values = bf16_of(f, sums[t * across + n], case.target)
                at = f.offset(place, 2 * _LANES * n)
                f.do(f"call void @llvm.masked.store.v16i16.p0({values}, {at}, i32 2, {inside[n]})")

        f.when(f.value("i1", f"icmp sgt {a['tokens']}, {t}"), token)


def _turn(f: Function, case: PanelCase, at: dict[str, Value], number: Value) -> None:
    """Some panels of rows: stretch by stretch dequantized, then multiplied with all tokens."""
    turn_rows = TURN_PANELS * PANEL_ROWS
    rows, tokens = at["rows"], at["tokens"]
    first = f.times(number, turn_rows)
    end = smaller(f, f.binary("add", first, turn_rows), rows)
    last = f.binary("sub", rows, 1)
    blocks = _divided(f, tokens, BLOCK_TOKENS)
    sums_bytes = 4 * turn_rows * BLOCK_TOKENS
    own_bytes = f.binary(
        "add", f.times(blocks, sums_bytes if len(case.stretches) > 1 else 0), TURN_PANELS * case.panel_bytes
    )
    panels = f.offset(at["scratch"], f.binary("mul", at["slot"], own_bytes))
    sums = f.offset(panels, TURN_PANELS * case.panel_bytes)

    def panel_of(row: Value) -> Value:
        return f.offset(panels, f.times(f.binary("sub", row, first), case.panel_bytes // PANEL_ROWS))

    def stretch(columns: tuple[int, int], name: str) -> None:
        def fill(row: Value, _: list[Value]) -> list[Value]:
            given = [at["codes"], at["scales"], at["zeros"], panel_of(row), row, last]
            units = ", ".join(f"i64 {column // 64}" for column in columns)
            f.do(f"call void @fill({', '.join(map(str, given))}, {units})")
            return []

        f.loop(end, [], fill, first=first, step=PANEL_ROWS)
        own = _stretch(f, case, at, columns[0])

        def block(b: Value, _: list[Value]) -> list[Value]:
            token = f.times(b, BLOCK_TOKENS)
            arranged = f.offset(own, f.times(b, 2 * BLOCK_TOKENS * (columns[1] - columns[0])))
            left = f.binary("sub", tokens, token)
            out = f.offset(at["out"], f.times(f.binary("mul", token, rows), 2))
            own_sums = f.offset(sums, f.times(b, sums_bytes if len(case.stretches) > 1 else 0))

            def multiply(row: Value, _: list[Value]) -> list[Value]:
                panel_sums = f.offset(own_sums, f.times(f.binary("sub", row, first), 4 * BLOCK_TOKENS))
                pointers = [arranged, panel_of(row), panel_sums, f.offset(out, f.times(row, 2))]
                pairs = Value("i64", str((columns[1] - columns[0]) // 2))
                given = [*pointers, pairs, rows, left, f.binary("sub", rows, row)]
                f.do(f"call void @{name}({', '.join(map(str, given))})")
                return []

            f.loop(end, [], multiply, first=first, step=PANEL_ROWS)
            return []

        f.loop(blocks, [], block)

    for i, columns in enumerate(case.stretches):
        stretch(columns, _multiply_name(i == 0, i == len(case.stretches) - 1))
