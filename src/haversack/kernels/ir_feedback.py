"""LLVM IR of second-order feedback within one block of columns: round a column, pass its error on to the next.

    run(job, parallel, threads)

`job` is an array of 64-bit words, in the order of `JOB`; matrices are `(columns, rows)` float32 with `rows` a multiple
of `TURN_ROWS`, so that a column of the packed matrix is contiguous and a vector holds as many rows of it. A team of
threads takes turns of `TURN_ROWS` rows, through all columns of the block: rows don't depend on each other. For column
k, in group g of the grid:

    wanted = target[k] - sum_{j<k} feedback[k, j] change[j]        code = clamp(rint(wanted inverse[g]) + zero[g], 0, last)
    change[k] = (code - zero[g]) scale[g] - weight[k]              error += square[k] ((code - zero[g]) scale[g] - wanted)^2

With a table of rising values, the code is the place of the value nearest to `wanted inverse[g]`, and stands for that value.
"""

from __future__ import annotations

from haversack.kernels.ir import Function, Module, Value, splat_constant, vector
from haversack.kernels.ir_table import nearest_entry
from haversack.kernels.ir_team import add_record_entry

LANES, NUM_VECTORS = 16, 4
"""Rows are taken 64 at a time: with four vectors in flight a fused multiply-add is never waited for, and the changes of
128 columns, 32 KiB, stay in L1."""

TURN_ROWS = LANES * NUM_VECTORS

JOB = (
    "target",
    "weight",
    "feedback",
    "square",
    "group",
    "scale",
    "inverse",
    "zero",
    "codes",
    "change",
    "error",
    "columns",
    "rows",
)
"""Words of a job. `group` holds one i64 per column; `scale`, `inverse` and `zero` are `(groups, rows)`; `feedback` is
`(columns, columns)`, read below its diagonal; `codes` is uint8 and `error` `(rows,)`."""

_NUMBERS = ("columns", "rows")
_FLOATS = vector(LANES, "float")


def feedback_text(num_codes: int, table: tuple[float, ...] | None = None) -> str:
    """The whole module, entry `run`, for a grid of codes from 0 to `num_codes - 1`, or into a table of rising values."""
    module = Module()
    add_record_entry(
        module,
        [("i64" if name in _NUMBERS else "ptr", name) for name in JOB],
        lambda f, at: f.binary("udiv", at["rows"], TURN_ROWS),
        lambda f, at, number: _turn(f, num_codes, table, at, number),
    )
    return module.text()


def _turn(f: Function, num_codes: int, table: tuple[float, ...] | None, at: dict[str, Value], number: Value) -> None:
    column_bytes = f.times(at["rows"], 4)
    feedback_bytes = f.times(at["columns"], 4)
    first = f.times(number, TURN_ROWS)
    first_bytes = f.times(first, 4)
    error = f.offset(at["error"], first_bytes)

    def vectors(matrix: str, row: Value) -> list[Value]:
        start = f.offset(f.offset(at[matrix], f.binary("mul", row, column_bytes)), first_bytes)
        return [f.load(_FLOATS, f.offset(start, 4 * LANES * v), 4) for v in range(NUM_VECTORS)]

    def column(k: Value, errors: list[Value]) -> list[Value]:
        line = f.offset(at["feedback"], f.binary("mul", k, feedback_bytes))

        def earlier(j: Value, wanted: list[Value]) -> list[Value]:
            factor = f.value("float", f"fneg {f.load('float', f.offset(line, f.times(j, 4)), 4)}")
            spread = f.splat(factor, LANES)
            return [_add_product(f, spread, c, w) for c, w in zip(vectors("change", j), wanted, strict=True)]

        wanted = f.loop(k, vectors("target", k), earlier)
        group = f.load("i64", f.offset(at["group"], f.times(k, 8)), 8)
        scale, inverse = (vectors(name, group) for name in ("scale", "inverse"))
        zero = vectors("zero", group) if table is None else []
        weight = vectors("weight", k)
        here = f.binary("add", f.binary("mul", k, at["rows"]), first)
        square = f.splat(f.load("float", f.offset(at["square"], f.times(k, 4)), 4), LANES)
        summed = []
        for v in range(NUM_VECTORS):
            place = f.binary("add", here, LANES * v)
            unit = f.binary("fmul", wanted[v], inverse[v])
            if table is None:
                whole = f.call(_FLOATS, f"llvm.rint.v{LANES}f32", unit)
                code = _clamped(f, f.binary("fadd", whole, zero[v]), num_codes - 1)
                unit = f.binary("fsub", code, zero[v])
            else:
                code, unit = nearest_entry(f, unit, table)
            value = f.binary("fmul", unit, scale[v])
            f.store(f.cast("fptoui", code, vector(LANES, "i8")), f.offset(at["codes"], place))
            f.store(f.binary("fsub", value, weight[v]), f.offset(at["change"], f.times(place, 4)), 4)
            off = f.binary("fsub", value, wanted[v])
            summed.append(_add_product(f, f.binary("fmul", off, off), square, errors[v]))
        return summed

    before = [f.load(_FLOATS, f.offset(error, 4 * LANES * v), 4) for v in range(NUM_VECTORS)]
    for v, value in enumerate(f.loop(at["columns"], before, column)):
        f.store(value, f.offset(error, 4 * LANES * v), 4)


def _add_product(f: Function, a: Value, b: Value, c: Value) -> Value:
    return f.call(_FLOATS, f"llvm.fmuladd.v{LANES}f32", a, b, c)


def _clamped(f: Function, value: Value, largest: int) -> Value:
    low = f.call(_FLOATS, f"llvm.maxnum.v{LANES}f32", value, splat_constant(_FLOATS, "0.0"))
    return f.call(_FLOATS, f"llvm.minnum.v{LANES}f32", low, splat_constant(_FLOATS, f"{largest}.0"))
