"""LLVM IR of a clipping search: of several scales offered to each group, the one with the least weighted squared error.

    run(job, parallel, threads)

`job` is an array of 64-bit words, in the order of `JOB`. A team of threads takes turns of `TURN_ROWS` rows. For each
group of each row, with weights w and importances h, and for each offer (scale, zero) in order:

    q = clamp(rint(w / scale) + zero, 0, last) - zero        error = sum h (q scale - w)^2

With a table of rising values, q is the value nearest to `w / scale`, and zeros are not read.

The first offer with the least error is written, with `sum h q w` and `sum h q q` under it, whose quotient is the
least-squares scale for these codes.
"""

from __future__ import annotations

from haversack.kernels.ir import Function, Module, Value, splat_constant, vector
from haversack.kernels.ir_float import sum_of_lanes
from haversack.kernels.ir_table import nearest_entry
from haversack.kernels.ir_team import add_record_entry, smaller

LANES, MAX_VECTORS = 16, 4
"""Groups are taken 64 columns at a time, in four sums; those of 16 and 32 columns in one and two."""

TURN_ROWS = 4

JOB = (
    "weight",
    "importance",
    "scale",
    "zero",
    "best",
    "products",
    "squares",
    "rows",
    "groups",
    "units",
    "offers",
)
"""Words of a job. `weight` is `(rows, groups, 16 vectors units)` and `importance` `(groups, 16 vectors units)`, float32; `scale` and
`zero` are `(offers, rows, groups)`; `best` (int64), `products` and `squares` `(rows, groups)`."""

_NUMBERS = ("rows", "groups", "units", "offers")
_FLOATS = vector(LANES, "float")


def unit_vectors(group_columns: int) -> int:
    """Vectors of a unit, of which a group takes whole numbers."""
    return min(MAX_VECTORS, 1 << (-(-group_columns // LANES) - 1).bit_length())


def scale_search_text(num_codes: int, num_vectors: int, table: tuple[float, ...] | None = None) -> str:
    """The whole module, entry `run`, for a grid of codes from 0 to `num_codes - 1`, or of a table's values."""
    module = Module()
    add_record_entry(
        module,
        [("i64" if name in _NUMBERS else "ptr", name) for name in JOB],
        lambda f, at: f.binary("udiv", f.binary("add", at["rows"], TURN_ROWS - 1), TURN_ROWS),
        lambda f, at, number: _turn(f, num_codes, num_vectors, table, at, number),
    )
    return module.text()


def _turn(
    f: Function,
    num_codes: int,
    num_vectors: int,
    table: tuple[float, ...] | None,
    at: dict[str, Value],
    number: Value,
) -> None:
    num_places = f.binary("mul", at["rows"], at["groups"])
    group_bytes = f.times(at["units"], 4 * LANES * num_vectors)

    def nearest(unit: Value, zero: Value) -> Value:
        if table is not None:
            return nearest_entry(f, unit, table)[1]
        code = f.binary("fadd", f.call(_FLOATS, f"llvm.rint.v{LANES}f32", unit), zero)
        low = f.call(_FLOATS, f"llvm.maxnum.v{LANES}f32", code, splat_constant(_FLOATS, "0.0"))
        last = splat_constant(_FLOATS, f"{num_codes - 1}.0")
        return f.binary("fsub", f.call(_FLOATS, f"llvm.minnum.v{LANES}f32", low, last), zero)

    def over_columns(weight: Value, importance: Value, offer: list[Value], num_sums: int) -> list[Value]:
        """Sums over a group's columns: the error, or the products and the squares."""
        scale, zero = offer
        is_zero = f.value("i1", f"fcmp oeq {scale}, 0.0")
        inverse = f.value("float", f"select {is_zero}, float 0.0, {f.value('float', f'fdiv float 1.0, {scale.name}')}")
        spread, inverse, zero = (f.splat(x, LANES) for x in (scale, inverse, zero))

        def unit(u: Value, sums: list[Value]) -> list[Value]:
            out = list(sums)
            for v in range(num_vectors):
                place = f.binary("add", f.times(u, 4 * LANES * num_vectors), 4 * LANES * v)
                w = f.load(_FLOATS, f.offset(weight, place), 4)
                h = f.load(_FLOATS, f.offset(importance, place), 4)
                q = nearest(f.binary("fmul", w, inverse), zero)
                if num_sums == 1:
                    off = f.binary("fsub", f.binary("fmul", q, spread), w)
                    out[v] = _add_product(f, f.binary("fmul", off, off), h, out[v])
                else:
                    hq = f.binary("fmul", h, q)
                    out[v] = _add_product(f, hq, w, out[v])
                    out[num_vectors + v] = _add_product(f, hq, q, out[num_vectors + v])
            return out

        start = [Value(_FLOATS, "zeroinitializer")] * (num_vectors * num_sums)
        sums = f.loop(at["units"], start, unit)
        return [_total(f, sums[num_vectors * s : num_vectors * (s + 1)]) for s in range(num_sums)]

    first = f.times(number, TURN_ROWS)
    last = smaller(f, f.binary("add", first, TURN_ROWS), at["rows"])

    def group(place: Value, _: list[Value]) -> list[Value]:
        of_row = f.binary("urem", place, at["groups"])
        weight = f.offset(at["weight"], f.binary("mul", place, group_bytes))
        importance = f.offset(at["importance"], f.binary("mul", of_row, group_bytes))

        def offered(o: Value) -> list[Value]:
            here = f.times(f.binary("add", f.binary("mul", o, num_places), place), 4)
            return [f.load("float", f.offset(at[name], here), 4) for name in ("scale", "zero")]

        def offer(o: Value, best: list[Value]) -> list[Value]:
            error = over_columns(weight, importance, offered(o), 1)[0]
            better = f.value("i1", f"fcmp olt {error}, {best[0].name}")
            return [
                f.value("float", f"select {better}, {error}, {best[0]}"),
                f.value("i64", f"select {better}, {o}, {best[1]}"),
            ]

        infinite = Value("float", "0x7FF0000000000000")
        best = f.loop(at["offers"], [infinite, Value("i64", "0")], offer)[1]
        products, squares = over_columns(weight, importance, offered(best), 2)
        f.store(best, f.offset(at["best"], f.times(place, 8)), 8)
        f.store(products, f.offset(at["products"], f.times(place, 4)), 4)
        f.store(squares, f.offset(at["squares"], f.times(place, 4)), 4)
        return []

    f.loop(f.binary("mul", last, at["groups"]), [], group, first=f.binary("mul", first, at["groups"]))


def _add_product(f: Function, a: Value, b: Value, c: Value) -> Value:
    return f.call(_FLOATS, f"llvm.fmuladd.v{LANES}f32", a, b, c)


def _total(f: Function, sums: list[Value]) -> Value:
    """The sum of one, two or four vectors' elements."""
    while len(sums) > 1:
        sums = [f.binary("fadd", a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
    return sum_of_lanes(f, sums[0])
