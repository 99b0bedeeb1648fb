"""LLVM IR that writes packed rows as floats, in order: tiles for long inputs, and rows of an embedding.

    dequantize(codes, scales, zeros, out, index, rows, rows_per_turn, parallel, threads)

Row i of `out` is row `index[i]` (int64) of the matrix, or row i where `index` is null; rows of `out` are `unit_columns`
long, so that whole units are written. `(code - zero) * scale` in float32, rounded once where bfloat16 is asked for.
"""

from __future__ import annotations

from haversack.kernels.dot_schemes import VectorsF32
from haversack.kernels.format import PackedFormat
from haversack.kernels.ir import Function, Module, Value
from haversack.kernels.ir_float import bf16_of, half_to_float
from haversack.kernels.llvm import Target

DEQUANTIZE_ARGUMENTS = [
    ("ptr", "codes"),
    ("ptr", "scales"),
    ("ptr", "zeros"),
    ("ptr", "out"),
    ("ptr", "index"),
    ("i64", "rows"),
    ("i64", "rows_per_turn"),
    ("ptr", "parallel"),
    ("i32", "threads"),
]

_JOB = ["codes", "scales", "zeros", "out", "index", "rows", "rows_per_turn", "next"]


def supports(fmt: PackedFormat) -> bool:
    """Groups are whole units."""
    return fmt.num_groups == 1 or fmt.group_size % 64 == 0


def dequantize_text(fmt: PackedFormat, dtype: str, target: Target) -> str:
    """The whole module, entry `dequantize`; `dtype` is "float32" or "bfloat16"."""
    module = Module()
    _add_row(module, fmt, dtype, target)
    _add_work(module, fmt, dtype)
    f = Function(module, "dequantize", DEQUANTIZE_ARGUMENTS)
    job = f.value("ptr", f"alloca [{len(_JOB)} x i64], align 64")
    for i, field in enumerate(_JOB):
        f.store(f.arguments.get(field, Value("i64", "0")), f.offset(job, 8 * i), 8)
    parallel, threads = f.arguments["parallel"], f.arguments["threads"]
    given = f.value("i1", f"icmp ne {parallel}, null")
    together = f.binary("and", given, f.value("i1", f"icmp sgt {threads}, 1"))
    f.when(together, lambda: f.do(f"call void {parallel.name}(ptr @work, {job}, {threads}, i32 0)"))
    f.do(f"call void @work({job})")
    f.end()
    return module.text()


def _add_row(module: Module, fmt: PackedFormat, dtype: str, target: Target) -> None:
    """`row(codes, scales, zeros, out)`: one row, unit by unit."""
    scheme = VectorsF32(fmt.bits)
    num_units = fmt.unit_columns // 64
    f = Function(module, "row", [("ptr", "codes"), ("ptr", "scales"), ("ptr", "zeros"), ("ptr", "out")])
    a = f.arguments
    size = 4 if dtype == "float32" else 2

    def unit(u: Value, _: list[Value]) -> list[Value]:
        group = Value("i64", "0") if fmt.num_groups == 1 else f.binary("udiv", u, fmt.group_size // 64)
        scale_bits = f.load("i16", f.offset(a["scales"], f.times(group, 2)), 2)
        scale = half_to_float(f, f.splat(scale_bits, 16), target)
        low = f.offset(a["codes"], f.times(u, scheme.unit_bytes))
        high = None
        if fmt.bits == 3:
            high = f.offset(f.offset(a["codes"], num_units * scheme.unit_bytes), f.times(u, 8))
        shift = None
        if not fmt.symmetric:
            zero = f.cast("uitofp", f.load("i8", f.offset(a["zeros"], group)), "float")
            centre = f"{float(1 << (fmt.bits - 1)):e}"
            shift = f.splat(f.value("float", f"fsub float {centre}, {zero.name}"), 16)
        for operand in scheme.operands(f, low, high, 1):
            value = operand.weights if shift is None else f.binary("fadd", operand.weights, shift)
            value = f.binary("fmul", value, scale)
            if dtype != "float32":
                value = bf16_of(f, value, target)
            place = f.offset(f.offset(a["out"], f.times(u, 64 * size)), 16 * size * operand.activations)
            f.store(value, place, 16)
        return []

    f.loop(num_units, [], unit)
    f.end()


def _add_work(module: Module, fmt: PackedFormat, dtype: str) -> None:
    """`work(job)`: one thread's turns, until there are none left."""
    f = Function(module, "work", [("ptr", "job")])
    job = f.arguments["job"]
    pointers = {"codes", "scales", "zeros", "out", "index"}
    fields = {
        n: f.load("ptr" if n in pointers else "i64", f.offset(job, 8 * i), 8) for i, n in enumerate(_JOB) if n != "next"
    }
    counter = f.offset(job, 8 * _JOB.index("next"))
    row_bytes = fmt.unit_columns * (4 if dtype == "float32" else 2)
    identity = f.value("i1", f"icmp eq {fields['index']}, null")

    def take() -> Value:
        turn = f.value("i64", f"atomicrmw add {counter}, i64 1 monotonic")
        return f.binary("mul", turn, fields["rows_per_turn"])

    def turn(state: list[Value]) -> list[Value]:
        end = f.binary("add", state[0], fields["rows_per_turn"])
        less = f.value("i1", f"icmp slt {end}, {fields['rows'].name}")
        last = f.value("i64", f"select {less}, {end}, {fields['rows']}")

        def row(i: Value, _: list[Value]) -> list[Value]:
            number = f.value("i64", f"call i64 @row_number({fields['index']}, {identity}, {i})")
            codes = f.offset(fields["codes"], f.times(number, fmt.row_bytes))
            scales = f.offset(fields["scales"], f.times(number, 2 * fmt.num_groups))
            zeros = f.offset(fields["zeros"], f.times(number, fmt.num_groups))
            f.do(f"call void @row({codes}, {scales}, {zeros}, {f.offset(fields['out'], f.times(i, row_bytes))})")
            return []

        f.loop(last, [], row, first=state[0])
        return [take()]

    f.while_less(take(), fields["rows"], turn)
    f.end()
    g = Function(module, "row_number", [("ptr", "index"), ("i1", "identity"), ("i64", "i")], "i64")
    # A null index is read at its own stack place instead, so that there is one path without a branch.
    own = g.value("ptr", "alloca i64, align 8")
    g.store(g.arguments["i"], own, 8)
    there = g.offset(g.arguments["index"], g.times(g.arguments["i"], 8))
    g.end(g.load("i64", g.value("ptr", f"select {g.arguments['identity']}, {own}, {there}"), 8))
