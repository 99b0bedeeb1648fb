"""LLVM IR that writes packed rows as floats, in order: tiles for long inputs, and rows of an embedding.

    dequantize(codes, scales, zeros, out, index, rows, parallel, threads)

Row i of `out` is row `index[i]` (int64) of the matrix, or row i where `index` is null; rows of `out` are `unit_columns`
long, so that whole units are written. `(code - zero) * scale` (or `table[code] * scale`) in float32, rounded once where
bfloat16 is asked for.
"""

from __future__ import annotations

from haversack.kernels.dot_schemes import VectorsF32
from haversack.kernels.format import SCALE_BYTES, PackedFormat
from haversack.kernels.ir import Function, Module, Value
from haversack.kernels.ir_float import bf16_of, scale_to_float
from haversack.kernels.ir_team import add_team_entry, num_turns_of_rows, rows_of_turn, smaller
from haversack.kernels.llvm import Target

DEQUANTIZE_ARGUMENTS = [
    ("ptr", "codes"),
    ("ptr", "scales"),
    ("ptr", "zeros"),
    ("ptr", "out"),
    ("ptr", "index"),
    ("i64", "rows"),
]


def supports(fmt: PackedFormat) -> bool:
    """Groups are whole units, or an even part of one that holds whole vectors of sixteen."""
    return fmt.num_groups == 1 or fmt.group_size % 64 == 0 or fmt.group_size in (16, 32)


def dequantize_text(fmt: PackedFormat, dtype: str, target: Target) -> str:
    """The whole module, entry `dequantize`; `dtype` is "float32" or "bfloat16"."""
    module = Module()
    add_units(module, fmt, dtype, target)
    _add_row_number(module)
    add_team_entry(
        module,
        "dequantize",
        DEQUANTIZE_ARGUMENTS,
        lambda f: {"num_turns": _num_turns(f, fmt)},
        lambda f, fields, turn: _turn(f, fmt, dtype, fields, turn),
    )
    return module.text()


def _num_turns(f: Function, fmt: PackedFormat) -> Value:
    threads = f.cast("sext", f.arguments["threads"], "i64")
    return num_turns_of_rows(f, f.arguments["rows"], fmt.row_bytes, threads)


def _turn(f: Function, fmt: PackedFormat, dtype: str, fields: dict[str, Value], turn: Value) -> None:
    first, last = rows_of_turn(f, fields, fields["rows"], turn)
    row_bytes = fmt.unit_columns * (4 if dtype == "float32" else 2)

    def row(i: Value, _: list[Value]) -> list[Value]:
        number = f.value("i64", f"call i64 @row_number({fields['index']}, {i})")
        codes = f.offset(fields["codes"], f.times(number, fmt.row_bytes))
        scales = f.offset(fields["scales"], f.times(number, fmt.scale_row_bytes))
        zeros = f.offset(fields["zeros"], f.times(number, fmt.num_groups))
        out = f.offset(fields["out"], f.times(i, row_bytes))
        f.do(f"call void @units({codes}, {scales}, {zeros}, {out}, i64 0, i64 {fmt.unit_columns // 64})")
        return []

    f.loop(last, [], row, first=first)


def add_units(module: Module, fmt: PackedFormat, dtype: str, target: Target) -> None:
    """`units(codes, scales, zeros, out, first, last)`: those units of 64 columns of a row, to `out`."""
    scheme = VectorsF32(fmt, target)
    num_units = fmt.unit_columns // 64
    pointers = [("ptr", "codes"), ("ptr", "scales"), ("ptr", "zeros"), ("ptr", "out")]
    f = Function(module, "units", [*pointers, ("i64", "first"), ("i64", "last")])
    a = f.arguments
    size = 4 if dtype == "float32" else 2

    def group_numbers(group: Value) -> tuple[Value, Value | None]:
        """Scale, and what is added to centred codes where there is a zero point, of a group: splat."""
        size_of_scale = SCALE_BYTES[fmt.scales]
        stored = f.load(f"i{8 * size_of_scale}", f.offset(a["scales"], f.times(group, size_of_scale)), size_of_scale)
        scale = scale_to_float(f, f.splat(stored, 16), fmt.scales, target)
        if fmt.symmetric:
            return scale, None
        zero = f.cast("uitofp", f.load("i8", f.offset(a["zeros"], group)), "float")
        centre = f"{float(1 << (fmt.bits - 1)):e}"
        return scale, f.splat(f.value("float", f"fsub float {centre}, {zero.name}"), 16)

    def groups_of(u: Value) -> list[tuple[Value, Value | None]]:
        """The numbers of each quarter of a unit."""
        if fmt.num_groups == 1:
            return [group_numbers(Value("i64", "0"))] * 4
        if fmt.group_size >= 64:
            return [group_numbers(f.binary("udiv", u, fmt.group_size // 64))] * 4
        found = []
        for part in range(64 // fmt.group_size):
            group = f.binary("add", f.times(u, 64 // fmt.group_size), part)
            last = Value("i64", str(fmt.num_groups - 1))  # the last unit may be padded beyond the last group
            found += [group_numbers(smaller(f, group, last))] * (fmt.group_size // 16)
        return found

    def unit(u: Value, _: list[Value]) -> list[Value]:
        numbers = groups_of(u)
        low = f.offset(a["codes"], f.times(u, scheme.unit_bytes))
        high = None
        if fmt.bits == 3:
            high = f.offset(f.offset(a["codes"], num_units * scheme.unit_bytes), f.times(u, 8))
        for operand in scheme.operands(f, low, high, 1):
            scale, shift = numbers[operand.activations]
            value = operand.weights if shift is None else f.binary("fadd", operand.weights, shift)
            value = f.binary("fmul", value, scale)
            if dtype != "float32":
                value = bf16_of(f, value, target)
            written = f.binary("sub", u, a["first"])
            place = f.offset(f.offset(a["out"], f.times(written, 64 * size)), 16 * size * operand.activations)
            f.store(value, place, 16)
        return []

    f.loop(a["last"], [], unit, first=a["first"])
    f.end()


def _add_row_number(module: Module) -> None:
    """`row_number(index, i)`: index[i], or i where `index` is null."""
    f = Function(module, "row_number", [("ptr", "index"), ("i64", "i")], "i64")
    index, i = f.arguments["index"], f.arguments["i"]
    # A null index is read at i's own stack place instead, so that there is one path without a branch.
    own = f.value("ptr", "alloca i64, align 8")
    f.store(i, own, 8)
    identity = f.value("i1", f"icmp eq {index}, null")
    f.end(f.load("i64", f.value("ptr", f"select {identity}, {own}, {f.offset(index, f.times(i, 8))}"), 8))
