"""LLVM IR of products with bit planes (`codecs/bitplanes.py`): sixteen rows at a time, one per lane.

    run(x, workspace, codes, scales, out, blocks, rows, tokens, parallel, threads)

`x` is float32 `(tokens, in)`, `out` float32 `(tokens, rows)`. Three ways to multiply the signs of a unit with its activations:

    tables   of every 4 columns the 16 sums of their activations under all signs, once per call; then each nibble of a plane
             is looked up (AVX-512: one permutation of sixteen floats; AVX2: two of eight and a blend)
    signs    the activation of a column, its sign bit flipped where a plane's bit is 0: any CPU
    counts   int8 activations are cut into 8 planes themselves; planes meet by `and`, and their set bits are counted. Integers
             throughout a group, so exact: with a_j plane j of an activation in two's complement and S the group's sum, a
             plane of signs gives 2 sum_j +-2^j popcount(w & a_j) - S

The first after Wei et al. 2024 (T-MAC, arXiv 2407.00088), with tables in float32 that are not rounded to int8
and full instead of half; the last after Ma et al. 2024 (arXiv 2409.17870), with activations in two's complement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from haversack.codecs.bitplanes import BLOCK_ROWS, UNIT_COLUMNS, VECTOR_BYTES
from haversack.kernels.dot_schemes import multiply_add
from haversack.kernels.format import PlaneFormat
from haversack.kernels.ir import Function, Module, Value, constant, splat_constant, zeros
from haversack.kernels.ir_float import bf16_of, half_to_float
from haversack.kernels.ir_team import add_team_entry, num_turns_of_rows, rows_of_turn, smaller
from haversack.kernels.llvm import Target

ACTIVATION_PLANES = 8

CHAINS = 4
"""Sums under way at once: one chain of additions would set the pace. They are those of the planes of as many blocks abreast as
there are chains for, which read each table once, or copies of a plane's own."""

PASS_BYTES = 64 << 10
"""Bytes of planes that all tokens go over before the next: they stay in L2 meanwhile."""

PREFETCH_BYTES = 8 << 10
"""How far ahead planes are asked for: looking up tables keeps a CPU from seeing the stream (7 GB/s without)."""

_F16, _I32 = "<16 x float>", "<16 x i32>"

ARGUMENTS = [
    ("ptr", "x"),
    ("ptr", "workspace"),
    ("ptr", "codes"),
    ("ptr", "scales"),
    ("ptr", "out"),
    ("i64", "blocks"),
    ("i64", "rows"),
    ("i64", "tokens"),
]


@dataclass(frozen=True)
class PlaneCase:
    """One kernel: `way` is "tables", "signs" or "counts"."""

    fmt: PlaneFormat
    way: str
    target: Target

    @property
    def num_units(self) -> int:
        return self.fmt.padded_columns // UNIT_COLUMNS

    @property
    def unit_words(self) -> int:
        """Vectors of 64 bytes that lay out one unit of one token's activations: tables, floats, or eight words of bits."""
        return {"tables": 8, "signs": 2, "counts": 1}[self.way]

    @property
    def activation_bytes(self) -> int:
        """Of one token, in all units."""
        return self.num_units * self.unit_words * 64

    @property
    def abreast(self) -> int:
        """Blocks multiplied together: 1, 2 or 4."""
        return max(1, CHAINS // self.fmt.bits) if self.way == "tables" and self.fmt.bits != 3 else 1

    @property
    def chains(self) -> int:
        """Sums of one plane of one block."""
        return max(1, CHAINS // (self.fmt.bits * self.abreast))

    @property
    def sums_at(self) -> int:
        return self.activation_bytes

    @property
    def token_bytes(self) -> int:
        """Counts also want each group's sum and scale."""
        return self.activation_bytes + (8 * self.fmt.num_groups + 63) // 64 * 64 * (self.way == "counts")

    def workspace_bytes(self, num_tokens: int) -> int:
        """Every token's activations, one in order, and 64 to align them."""
        return num_tokens * self.token_bytes + 4 * self.fmt.padded_columns + 64


def way_of(target: Target, activation_bits: int) -> str:
    """The way to multiply floats, or int8, on a CPU."""
    if activation_bits == 8:
        return "counts"
    return "tables" if target.has("avx2") else "signs"


def planes_text(case: PlaneCase) -> str:
    """The whole module, entry `run`."""
    module = Module()
    _add_prepare(module, case)
    for num_blocks in {1, case.abreast}:
        _add_blocks(module, case, num_blocks)
    _add_store(module)
    add_team_entry(module, "run", ARGUMENTS, lambda f: _prepare(f, case), lambda f, a, turn: _turn(f, case, a, turn))
    return module.text()


def _prepare(f: Function, case: PlaneCase) -> dict[str, Value]:
    a = f.arguments
    address = f.cast("ptrtoint", a["workspace"], "i64")
    scratch = f.cast("inttoptr", f.binary("and", f.binary("add", address, 63), -64), "ptr")
    tokens = f.offset(scratch, 4 * case.fmt.padded_columns)

    def token(t: Value, _: list[Value]) -> list[Value]:
        x = f.offset(a["x"], f.times(t, 4 * case.fmt.in_features))
        f.do(f"call void @prepare({x}, {scratch}, {f.offset(tokens, f.times(t, case.token_bytes))})")
        return []

    f.loop(a["tokens"], [], token)
    threads = f.cast("sext", a["threads"], "i64")
    turns = num_turns_of_rows(f, a["blocks"], case.fmt.block_bytes, threads)
    return {"laid_out": tokens, "num_turns": turns}


def _turn(f: Function, case: PlaneCase, fields: dict[str, Value], turn: Value) -> None:
    """The blocks of one turn, a few at a time for all tokens."""
    first, last = rows_of_turn(f, fields, fields["blocks"], turn)
    step = max(1, PASS_BYTES // (case.fmt.block_bytes * case.abreast)) * case.abreast

    def pass_(start: Value, _: list[Value]) -> list[Value]:
        end = smaller(f, f.binary("add", start, step), last)

        def token(t: Value, _: list[Value]) -> list[Value]:
            activations = f.offset(fields["laid_out"], f.times(t, case.token_bytes))
            row = f.offset(fields["out"], f.times(f.binary("mul", t, fields["rows"]), 4))

            def blocks(num_blocks: int) -> Callable[[Value, list[Value]], list[Value]]:
                def body(b: Value, _: list[Value]) -> list[Value]:
                    codes = f.offset(fields["codes"], f.times(b, case.fmt.block_bytes))
                    scales = f.offset(fields["scales"], f.times(b, case.fmt.scale_block_bytes))
                    at = f.times(b, BLOCK_ROWS)
                    given = [activations, codes, scales, f.offset(row, f.times(at, 4))]
                    given.append(f.binary("sub", fields["rows"], at))
                    f.do(f"call void @blocks{num_blocks}({', '.join(map(str, given))})")
                    return []

                return body

            together = f.binary("and", f.binary("sub", end, start), -case.abreast)
            middle = f.binary("add", start, together)
            f.loop(middle, [], blocks(case.abreast), first=start, step=case.abreast)
            f.loop(end, [], blocks(1), first=middle)
            return []

        f.loop(fields["tokens"], [], token)
        return []

    f.loop(last, [], pass_, first=first, step=step)


def _add_blocks(module: Module, case: PlaneCase, num_blocks: int) -> None:
    """`blocks{n}(activations, codes, scales, out, valid)`: sixteen rows each, `valid` of which are written, for one token."""
    fmt = case.fmt
    arguments = [("ptr", "activations"), ("ptr", "codes"), ("ptr", "scales"), ("ptr", "out"), ("i64", "valid")]
    f = Function(module, f"blocks{num_blocks}", arguments)
    a = f.arguments

    def group(g: Value, carried: list[Value]) -> list[Value]:
        at = f.times(g, fmt.group_units * fmt.bits * VECTOR_BYTES)
        codes = [f.offset(f.offset(a["codes"], at), n * fmt.block_bytes) for n in range(num_blocks)]
        activations = f.offset(a["activations"], f.times(g, fmt.group_units * case.unit_words * 64))
        first = f.offset(a["scales"], f.times(g, 32 * fmt.scales_per_group))
        scales = [
            [
                half_to_float(
                    f, f.load("<16 x i16>", f.offset(first, n * fmt.scale_block_bytes + 32 * p), 2), case.target
                )
                for p in range(fmt.scales_per_group)
            ]
            for n in range(num_blocks)
        ]
        if case.way == "counts":
            return [_counted_group(f, case, g, codes[0], activations, scales[0], carried[0])]
        return _summed_group(f, case, codes, activations, scales, carried)

    totals = f.loop(fmt.num_groups, [zeros(_F16)] * num_blocks, group)
    for n, total in enumerate(totals):
        valid = f.binary("sub", a["valid"], n * BLOCK_ROWS)
        f.do(f"call void @store_rows({total}, {f.offset(a['out'], 4 * n * BLOCK_ROWS)}, {valid})")
    f.end()


def _add_store(module: Module) -> None:
    """`store_rows(lanes, out, valid)`: the first `valid` of sixteen floats."""
    f = Function(module, "store_rows", [(_F16, "lanes"), ("ptr", "out"), ("i64", "valid")])
    lanes, out, valid = f.arguments["lanes"], f.arguments["out"], f.arguments["valid"]
    f.when(f.value("i1", f"icmp sge {valid}, {BLOCK_ROWS}"), lambda: f.store(lanes, out, 4))

    def some() -> None:
        place = f.value("ptr", f"alloca {_F16}, align 64")
        f.store(lanes, place, 64)

        def one(i: Value, _: list[Value]) -> list[Value]:
            at = f.times(i, 4)
            f.store(f.load("float", f.offset(place, at), 4), f.offset(out, at), 4)
            return []

        f.loop(valid, [], one)

    f.when(f.value("i1", f"icmp slt {valid}, {BLOCK_ROWS}"), some)
    f.end()


def _summed_group(
    f: Function,
    case: PlaneCase,
    codes: list[Value],
    activations: Value,
    scales: list[list[Value]],
    totals: list[Value],
) -> list[Value]:
    """Every block's total plus a group's sums over planes times their scales, in float32."""
    bits, chains = case.fmt.bits, case.chains
    add = _looked_up if case.way == "tables" else _flipped

    def unit(u: Value, carried: list[Value]) -> list[Value]:
        sums = list(carried)
        at = f.times(u, bits * VECTOR_BYTES)
        words = [_ask_and_load(f, f.offset(f.offset(c, at), p * VECTOR_BYTES)) for c in codes for p in range(bits)]
        add(f, case, words, f.offset(activations, f.times(u, case.unit_words * 64)), sums)
        return sums

    sums = f.loop(case.fmt.group_units, [zeros(_F16)] * (len(codes) * bits * chains), unit)
    planes = []
    for first in range(0, len(sums), chains):
        plane = sums[first]
        for other in sums[first + 1 : first + chains]:
            plane = f.binary("fadd", plane, other)
        planes.append(plane)
    return [_scaled(f, planes[n * bits : (n + 1) * bits], scales[n], total) for n, total in enumerate(totals)]


def _ask_and_load(f: Function, place: Value) -> Value:
    """One plane of a unit; another, further on, is asked for, which never faults."""
    f.module.declare("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
    f.do(f"call void @llvm.prefetch.p0({f.offset(place, PREFETCH_BYTES)}, i32 0, i32 2, i32 1)")
    return f.load(_I32, place, 4)


def _scaled(f: Function, planes: list[Value], scales: list[Value], total: Value) -> Value:
    """`total` plus planes times a scale each, or the sum of 2^p times plane p times the one scale."""
    if len(scales) == len(planes):
        for plane, scale in zip(planes, scales, strict=True):
            total = multiply_add(f, plane, scale, total)
        return total
    whole = planes[-1]
    for plane in reversed(planes[:-1]):
        whole = multiply_add(f, whole, splat_constant(_F16, "2.0"), plane)
    return multiply_add(f, whole, scales[0], total)


def _looked_up(f: Function, case: PlaneCase, words: list[Value], tables: Value, sums: list[Value]) -> None:
    """Add to `sums`, ordered word, chain, what eight tables say of eight nibbles of every word."""
    for k in range(8):
        place = f.offset(tables, 64 * k)
        look_up = _look_up_512 if case.target.has("avx512f") else _look_up_256
        for p, word in enumerate(words):
            index = word if k == 0 else f.binary("lshr", word, splat_constant(_I32, 4 * k))
            slot = p * case.chains + k % case.chains
            sums[slot] = f.binary("fadd", sums[slot], look_up(f, place, index))


def _look_up_512(f: Function, place: Value, index: Value) -> Value:
    """Only the low four bits of an index matter."""
    return f.call(_F16, "llvm.x86.avx512.permvar.sf.512", f.load(_F16, place, 64), index)


def _look_up_256(f: Function, place: Value, index: Value) -> Value:
    """Each half of the table by the low three bits, and the fourth chooses between them: eight rows at a time."""
    half = [f.load("<8 x float>", f.offset(place, 32 * i), 32) for i in range(2)]
    signs = f.binary("shl", index, splat_constant(_I32, 28))
    eights = []
    for first in (0, 8):
        part = f.shuffle(index, None, range(first, first + 8))
        low, high = (f.call("<8 x float>", "llvm.x86.avx2.permps", table, part) for table in half)
        chosen = f.cast("bitcast", f.shuffle(signs, None, range(first, first + 8)), "<8 x float>")
        eights.append(f.call("<8 x float>", "llvm.x86.avx.blendv.ps.256", low, high, chosen))
    return f.shuffle(eights[0], eights[1], range(16))


def _flipped(f: Function, case: PlaneCase, words: list[Value], floats: Value, sums: list[Value]) -> None:
    """Add a unit's activations, each with the sign that a plane's bit gives it."""
    unset = [f.binary("xor", word, splat_constant(_I32, -1)) for word in words]
    for column in range(UNIT_COLUMNS):
        x = f.cast("bitcast", f.splat(f.load("float", f.offset(floats, 4 * column), 4), 16), _I32)
        for p, word in enumerate(unset):
            shifted = f.binary("shl", word, splat_constant(_I32, 31 - column))
            sign = f.binary("and", shifted, splat_constant(_I32, -(1 << 31)))
            slot = p * case.chains + column % case.chains
            sums[slot] = f.binary("fadd", sums[slot], f.cast("bitcast", f.binary("xor", x, sign), _F16))


def _counted_group(
    f: Function, case: PlaneCase, g: Value, codes: Value, activations: Value, scales: list[Value], total: Value
) -> Value:
    """`total` plus a group's integers times the activations' scale and its own."""
    fmt = case.fmt
    numbers = f.offset(f.offset(f.arguments["activations"], case.sums_at), f.times(g, 8))
    group_sum = f.splat(f.load("i32", numbers, 4), 16)
    step = f.splat(f.load("float", f.offset(numbers, 4), 4), 16)
    planes = []
    for p in range(fmt.bits):
        counts = [zeros(_I32)] * ACTIVATION_PLANES
        for u in range(fmt.group_units):
            word = _ask_and_load(f, f.offset(codes, (u * fmt.bits + p) * VECTOR_BYTES))
            for j in range(ACTIVATION_PLANES):
                other = f.splat(f.load("i32", f.offset(activations, u * case.unit_words * 64 + 4 * j), 4), 16)
                set_bits = f.call(_I32, "llvm.ctpop.v16i32", f.binary("and", word, other))
                counts[j] = f.binary("add", counts[j], set_bits)
        # In two's complement the highest plane counts negative; twice the sum comes by one more shift.
        whole = f.binary("sub", zeros(_I32), counts[-1])
        for count in reversed(counts[:-1]):
            whole = f.binary("add", f.binary("shl", whole, splat_constant(_I32, 1)), count)
        planes.append(f.binary("sub", f.binary("shl", whole, splat_constant(_I32, 1)), group_sum))
    if fmt.bases:
        floats = [f.binary("fmul", f.cast("sitofp", plane, _F16), step) for plane in planes]
        return _scaled(f, floats, scales, total)
    exact = planes[-1]
    for plane in reversed(planes[:-1]):
        exact = f.binary("add", f.binary("shl", exact, splat_constant(_I32, 1)), plane)
    return multiply_add(f, f.binary("fmul", f.cast("sitofp", exact, _F16), step), scales[0], total)


def _add_prepare(module: Module, case: PlaneCase) -> None:
    """`prepare(x, scratch, out)`: one token's activations, as `block` reads them. `scratch` takes them in order."""
    f = Function(module, "prepare", [("ptr", "x"), ("ptr", "scratch"), ("ptr", "out")])
    ordered = f.arguments["out"] if case.way == "signs" else f.arguments["scratch"]
    _copy_padded(f, case, ordered)
    if case.way == "tables":
        f.loop(case.fmt.padded_columns // 4, [], lambda i, _: _write_table(f, ordered, i))
    elif case.way == "counts":
        f.loop(case.fmt.num_groups, [], lambda g, _: _write_planes(f, case, ordered, g))
    f.end()


def _copy_padded(f: Function, case: PlaneCase, out: Value) -> None:
    def clear(i: Value, _: list[Value]) -> list[Value]:
        f.store(zeros(_F16), f.offset(out, i), 64)
        return []

    def copy(lanes: str, size: int) -> Callable[[Value, list[Value]], list[Value]]:
        def body(i: Value, _: list[Value]) -> list[Value]:
            at = f.times(i, 4)
            f.store(f.load(lanes, f.offset(f.arguments["x"], at), 4), f.offset(out, at), size)
            return []

        return body

    # The last group, of 32 columns or more, is where padding is.
    count, padded = case.fmt.in_features, case.fmt.padded_columns
    f.loop(4 * padded, [], clear, first=4 * (padded - case.fmt.group_size), step=64)
    whole = count // 16 * 16
    f.loop(whole, [], copy(_F16, 64), step=16)
    f.loop(count, [], copy("float", 4), first=whole)


def _write_table(f: Function, floats: Value, i: Value) -> list[Value]:
    """The sixteen sums of four activations: bit k of a sum's number says whether activation k is added or taken off."""
    at = f.offset(floats, f.times(i, 16))
    sums = None
    for k in range(4):
        x = f.splat(f.load("float", f.offset(at, 4 * k), 4), 16)
        signs = constant("float", [f"{1.0 if number >> k & 1 else -1.0:e}" for number in range(16)])
        signed = f.binary("fmul", x, signs)
        sums = signed if sums is None else f.binary("fadd", sums, signed)
    assert sums is not None
    f.store(sums, f.offset(f.arguments["out"], f.times(i, 64)), 64)
    return []


def _write_planes(f: Function, case: PlaneCase, floats: Value, g: Value) -> list[Value]:
    """A group rounded to whole numbers of its largest magnitude / 127, cut into planes; its sum and that scale."""
    fmt, out = case.fmt, f.arguments["out"]
    vectors = [
        f.load(_F16, f.offset(f.offset(floats, f.times(g, 4 * fmt.group_size)), 64 * i), 64)
        for i in range(fmt.group_size // 16)
    ]
    largest = zeros(_F16)
    for value in vectors:
        magnitude = f.call(_F16, "llvm.fabs.v16f32", value)
        larger = f.value("<16 x i1>", f"fcmp ogt {magnitude}, {largest.name}")
        largest = f.value(_F16, f"select {larger}, {magnitude}, {largest}")
    f.module.declare("declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)")
    widest = f.value("float", f"call nnan float @llvm.vector.reduce.fmax.v16f32({largest})")
    scale = f.value("float", f"fdiv {widest}, 1.270000e+02")
    # Below this the reciprocal overflows; such a group adds nothing that a float32 sum would keep.
    tiny = f.value("i1", f"fcmp olt {widest}, 0x3A00000000000000")
    ratio = f.value("float", f"fdiv float 1.270000e+02, {widest.name}")
    inverse = f.splat(f.value("float", f"select {tiny}, float 0.0, {ratio}"), 16)
    total = zeros(_I32)
    units = f.offset(out, f.times(g, fmt.group_units * case.unit_words * 64))
    for i, value in enumerate(vectors):
        whole = f.call(_F16, "llvm.rint.v16f32", f.binary("fmul", value, inverse))
        number = f.call(_I32, "llvm.fptosi.sat.v16i32.v16f32", whole)
        total = f.binary("add", total, number)
        for j in range(ACTIVATION_PLANES):
            bit = f.binary("and", number, splat_constant(_I32, 1 << j))
            set_bits = f.value("<16 x i1>", f"icmp ne {bit}, zeroinitializer")
            unit, half = divmod(i, 2)
            place = f.offset(units, unit * case.unit_words * 64 + 4 * j + 2 * half)
            f.store(f.cast("bitcast", set_bits, "i16"), place, 2)
    f.module.declare("declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)")
    numbers = f.offset(f.offset(out, case.sums_at), f.times(g, 8))
    f.store(f.value("i32", f"call i32 @llvm.vector.reduce.add.v16i32({total})"), numbers, 4)
    f.store(scale, f.offset(numbers, 4), 4)
    return []


TILE_ARGUMENTS = [("ptr", "codes"), ("ptr", "scales"), ("ptr", "out"), ("i64", "blocks")]


def plane_tiles_text(fmt: PlaneFormat, dtype: str, target: Target) -> str:
    """Entry `dequantize(codes, scales, out, blocks, parallel, threads)`: the tile `(padded columns, 16 * blocks)`, that is the
    matrix transposed, float32 or bfloat16."""
    module = Module()

    def turns(f: Function) -> dict[str, Value]:
        threads = f.cast("sext", f.arguments["threads"], "i64")
        return {"num_turns": num_turns_of_rows(f, f.arguments["blocks"], fmt.block_bytes, threads)}

    def turn(f: Function, fields: dict[str, Value], number: Value) -> None:
        first, last = rows_of_turn(f, fields, fields["blocks"], number)

        # All blocks of a unit before the next: what is written lies together, where a block's columns lie far apart.
        def unit(u: Value, _: list[Value]) -> list[Value]:
            f.loop(last, [], lambda b, _: _write_unit(f, fmt, dtype, target, fields, b, u), first=first)
            return []

        f.loop(fmt.padded_columns // UNIT_COLUMNS, [], unit)

    add_team_entry(module, "dequantize", TILE_ARGUMENTS, turns, turn)
    return module.text()


def _write_unit(
    f: Function, fmt: PlaneFormat, dtype: str, target: Target, fields: dict[str, Value], b: Value, u: Value
) -> list[Value]:
    """One unit of one block: 32 columns, each a vector of sixteen rows."""
    size = 4 if dtype == "float32" else 2
    codes = f.offset(fields["codes"], f.times(b, fmt.block_bytes))
    scales = f.offset(fields["scales"], f.times(b, fmt.scale_block_bytes))
    column_bytes = f.times(fields["blocks"], BLOCK_ROWS * size)
    out = f.offset(fields["out"], f.times(b, BLOCK_ROWS * size))
    g = f.binary("udiv", u, fmt.group_units)
    at = f.offset(scales, f.times(g, 32 * fmt.scales_per_group))
    stored = [
        half_to_float(f, f.load("<16 x i16>", f.offset(at, 32 * p), 2), target) for p in range(fmt.scales_per_group)
    ]
    if not fmt.bases:
        stored = [f.binary("fmul", stored[0], splat_constant(_F16, f"{2.0**p:e}")) for p in range(fmt.bits)]
    sizes = [f.cast("bitcast", scale, _I32) for scale in stored]
    words = [
        f.load(_I32, f.offset(codes, f.binary("add", f.times(u, fmt.bits * VECTOR_BYTES), p * VECTOR_BYTES)), 4)
        for p in range(fmt.bits)
    ]
    unset = [f.binary("xor", word, splat_constant(_I32, -1)) for word in words]
    place = f.offset(out, f.binary("mul", f.times(u, UNIT_COLUMNS), column_bytes))

    def column(c: Value, _: list[Value]) -> list[Value]:
        amount = f.splat(f.cast("trunc", f.binary("sub", Value("i64", "31"), c), "i32"), 16)
        total = None
        for word, scale in zip(unset, sizes, strict=True):
            sign = f.binary("and", f.binary("shl", word, amount), splat_constant(_I32, -(1 << 31)))
            value = f.cast("bitcast", f.binary("xor", scale, sign), _F16)
            total = value if total is None else f.binary("fadd", total, value)
        assert total is not None
        bits = total if dtype == "float32" else bf16_of(f, total, target)
        f.store(bits, f.offset(place, f.binary("mul", c, column_bytes)), 16)
        return []

    f.loop(UNIT_COLUMNS, [], column)
    return []
