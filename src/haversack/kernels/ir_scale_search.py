"""LLVM IR of a clipping search: of several scales offered to each group, the one with the least weighted squared error.

    run(job, parallel, threads)

`job` is an array of 64-bit words, in the order of `JOB`. A team of threads takes turns of `TURN_ROWS` rows. For each
group of each row, with weights w and importances h, and for each offer (scale, zero) in order:

    q = clamp(rint(w / scale) + zero, 0, last) - zero        error = sum h (q scale - w)^2

The first offer with the least error is written, with `sum h q w` and `sum h q q` under it, whose quotient is the
least-squares scale for these codes.
"""

from __future__ import annotations

from haversack.kernels.ir import Function, Module, Value, splat_constant, vector

LANES, NUM_VECTORS = 16, 4
UNIT_COLUMNS = LANES * NUM_VECTORS
"""Groups are taken 64 columns at a time, in four sums."""

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
    "next",
)
"""Words of a job. `weight` is `(rows, groups, 64 units)` and `importance` `(groups, 64 units)`, float32; `scale` and
`zero` are `(offers, rows, groups)`; `best` (int64), `products` and `squares` `(rows, groups)`; `next` is 0."""

_NUMBERS = ("rows", "groups", "units", "offers", "next")
_FLOATS = vector(LANES, "float")


def scale_search_text(num_codes: int) -> str:
    """The whole module, entry `run`, for a grid of codes from 0 to `num_codes - 1`."""
    module = Module()
    _add_work(module, num_codes)
    f = Function(module, "run", [("ptr", "job"), ("ptr", "parallel"), ("i32", "threads")])
    a = f.arguments
    given = f.value("i1", f"icmp ne {a['parallel']}, null")
    several = f.value("i1", f"icmp sgt {a['threads']}, 1")
    together = f.binary("and", given, several)
    f.when(together, lambda: f.do(f"call void {a['parallel'].name}(ptr @work, {a['job']}, {a['threads']}, i32 0)"))
    f.do(f"call void @work({a['job']})")  # after a team this finds no turn left; without one it does them all
    f.end()
    return module.text()


def _add_work(module: Module, num_codes: int) -> None:
    f = Function(module, "work", [("ptr", "job")])
    job = f.arguments["job"]
    at = {n: f.load("i64" if n in _NUMBERS else "ptr", f.offset(job, 8 * i), 8) for i, n in enumerate(JOB)}
    counter = f.offset(job, 8 * JOB.index("next"))
    turns = f.binary("udiv", f.binary("add", at["rows"], TURN_ROWS - 1), TURN_ROWS)
    num_places = f.binary("mul", at["rows"], at["groups"])
    group_bytes = f.times(at["units"], 4 * UNIT_COLUMNS)

    def over_columns(weight: Value, importance: Value, offer: list[Value], num_sums: int) -> list[Value]:
        """Sums over a group's columns: the error, or the products and the squares."""
        scale, zero = offer
        is_zero = f.value("i1", f"fcmp oeq {scale}, 0.0")
        inverse = f.value("float", f"select {is_zero}, float 0.0, {f.value('float', f'fdiv float 1.0, {scale.name}')}")
        spread, inverse, zero = (f.splat(x, LANES) for x in (scale, inverse, zero))

        def unit(u: Value, sums: list[Value]) -> list[Value]:
            out = list(sums)
            for v in range(NUM_VECTORS):
                place = f.binary("add", f.times(u, 4 * UNIT_COLUMNS), 4 * LANES * v)
                w = f.load(_FLOATS, f.offset(weight, place), 4)
                h = f.load(_FLOATS, f.offset(importance, place), 4)
                whole = f.call(_FLOATS, f"llvm.rint.v{LANES}f32", f.binary("fmul", w, inverse))
                low = f.call(
                    _FLOATS,
                    f"llvm.maxnum.v{LANES}f32",
                    f.binary("fadd", whole, zero),
                    splat_constant(_FLOATS, "0.0"),
                )
                code = f.call(_FLOATS, f"llvm.minnum.v{LANES}f32", low, splat_constant(_FLOATS, f"{num_codes - 1}.0"))
                q = f.binary("fsub", code, zero)
                if num_sums == 1:
                    off = f.binary("fsub", f.binary("fmul", q, spread), w)
                    out[v] = _add_product(f, f.binary("fmul", off, off), h, out[v])
                else:
                    hq = f.binary("fmul", h, q)
                    out[v] = _add_product(f, hq, w, out[v])
                    out[NUM_VECTORS + v] = _add_product(f, hq, q, out[NUM_VECTORS + v])
            return out

        start = [Value(_FLOATS, "zeroinitializer")] * (NUM_VECTORS * num_sums)
        sums = f.loop(at["units"], start, unit)
        return [_total(f, sums[NUM_VECTORS * s : NUM_VECTORS * (s + 1)]) for s in range(num_sums)]

    def turn(state: list[Value]) -> list[Value]:
        first = f.times(state[0], TURN_ROWS)
        beyond = f.binary("add", first, TURN_ROWS)
        less = f.value("i1", f"icmp slt {beyond}, {at['rows'].name}")
        last = f.value("i64", f"select {less}, {beyond}, {at['rows']}")

        def group(place: Value, _: list[Value]) -> list[Value]:
            number = f.binary("urem", place, at["groups"])
            weight = f.offset(at["weight"], f.binary("mul", place, group_bytes))
            importance = f.offset(at["importance"], f.binary("mul", number, group_bytes))

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
        return [f.value("i64", f"atomicrmw add {counter}, i64 1 monotonic")]

    taken = f.value("i64", f"atomicrmw add {counter}, i64 1 monotonic")
    f.while_less(taken, turns, turn)
    f.end()


def _add_product(f: Function, a: Value, b: Value, c: Value) -> Value:
    return f.call(_FLOATS, f"llvm.fmuladd.v{LANES}f32", a, b, c)


def _total(f: Function, sums: list[Value]) -> Value:
    """The sum of four vectors' elements."""
    whole = f.binary("fadd", f.binary("fadd", sums[0], sums[1]), f.binary("fadd", sums[2], sums[3]))
    f.module.declare(f"declare float @llvm.vector.reduce.fadd.v{LANES}f32(float, {_FLOATS})")
    return f.value("float", f"call reassoc float @llvm.vector.reduce.fadd.v{LANES}f32(float 0.0, {whole})")
