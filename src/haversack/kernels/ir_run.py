"""LLVM IR of a kernel's entry: prepare the activations, then let a team of threads take turns of rows.

    run(x, workspace, matrices, num_matrices, tokens, rows_per_turn, parallel, threads)

`matrices` is an array of five 64-bit words each: codes, scales, zeros, out, rows. Several matrices that read the same
activations (query, key and value; gate and up) are one call: prepared once, one start of the team. `out` of a matrix is
`(tokens, rows)`, contiguous.
"""

from __future__ import annotations

from haversack.kernels.ir import Function, Module, Value
from haversack.kernels.ir_matmul import MatmulCase, add_rows
from haversack.kernels.ir_prepare import add_prepare

RUN_ARGUMENTS = [
    ("ptr", "x"),
    ("ptr", "workspace"),
    ("ptr", "matrices"),
    ("i64", "num_matrices"),
    ("i64", "tokens"),
    ("i64", "rows_per_turn"),
    ("ptr", "parallel"),
    ("i32", "threads"),
]

MATRIX_WORDS = 5
"""64-bit words per matrix: codes, scales, zeros, out, rows."""

_JOB = ["rounds", "matrices", "num_matrices", "tokens", "rows_per_turn", "next"]


def matmul_text(case: MatmulCase) -> str:
    """The whole module, entry `run`."""
    module = Module()
    add_prepare(module, case)
    add_rows(module, case)
    _add_work(module, case)
    _add_run(module, case)
    return module.text()


def _add_run(module: Module, case: MatmulCase) -> None:
    f = Function(module, "run", RUN_ARGUMENTS)
    a = f.arguments
    address = f.cast("ptrtoint", a["workspace"], "i64")
    scratch = f.cast("inttoptr", f.binary("and", f.binary("add", address, 63), -64), "ptr")
    rounds = f.offset(scratch, case.scratch_bytes)
    token_bytes = case.fmt.in_features * (4 if case.dtype == "float32" else 2)
    num_rounds = _rounds(f, case, a["tokens"])

    def round_(r: Value, _: list[Value]) -> list[Value]:
        here = f.offset(rounds, f.times(r, case.round_bytes))

        def token(t: Value, _: list[Value]) -> list[Value]:
            number = f.binary("add", f.times(r, case.tokens), t)
            there = f.value("i1", f"icmp slt {number}, {a['tokens'].name}")
            source = f.offset(a["x"], f.times(number, token_bytes))
            x = f.value("ptr", f"select {there}, {source}, ptr null")
            f.do(f"call void @prepare({x}, {scratch}, {here}, {t})")
            return []

        f.loop(case.tokens, [], token)
        return []

    f.loop(num_rounds, [], round_)
    job = f.value("ptr", f"alloca [{len(_JOB)} x i64], align 64")
    for i, field in enumerate(_JOB):
        value = {"rounds": rounds, "next": Value("i64", "0")}.get(field) or a[field]
        f.store(value, f.offset(job, 8 * i), 8)
    given = f.value("i1", f"icmp ne {a['parallel']}, null")
    several = f.value("i1", f"icmp sgt {a['threads']}, 1")
    together = f.binary("and", given, several)
    f.when(together, lambda: f.do(f"call void {a['parallel'].name}(ptr @work, {job}, {a['threads']}, i32 0)"))
    # After a team this finds no turn left; without one it does them all.
    f.do(f"call void @work({job})")
    f.end()


def _add_work(module: Module, case: MatmulCase) -> None:
    """`work(job)`: one thread's turns, until there are none left."""
    f = Function(module, "work", [("ptr", "job")])
    types = {"rounds": "ptr", "matrices": "ptr"}
    job = f.arguments["job"]
    fields = {n: f.load(types.get(n, "i64"), f.offset(job, 8 * i), 8) for i, n in enumerate(_JOB) if n != "next"}
    counter = f.offset(job, 8 * _JOB.index("next"))
    per_turn, tokens = fields["rows_per_turn"], fields["tokens"]
    num_rounds = _rounds(f, case, tokens)
    size = 4 if case.dtype == "float32" else 2

    def matrix(m: Value, carried: list[Value]) -> list[Value]:
        """Turns are numbered through all matrices: `carried` is the next turn, and the first turn of this matrix."""
        at = f.offset(fields["matrices"], f.times(m, 8 * MATRIX_WORDS))
        codes, scales, zeros, out = (f.load("ptr", f.offset(at, 8 * i), 8) for i in range(4))
        rows = f.load("i64", f.offset(at, 32), 8)
        turns = f.binary("udiv", f.binary("add", rows, f.binary("sub", per_turn, 1)), per_turn)
        end = f.binary("add", carried[1], turns)

        def turn(state: list[Value]) -> list[Value]:
            first = f.binary("mul", f.binary("sub", state[0], carried[1]), per_turn)
            last = _smaller(f, f.binary("add", first, per_turn), rows)

            def round_(r: Value, _: list[Value]) -> list[Value]:
                done = f.times(r, case.tokens)
                here = f.offset(fields["rounds"], f.times(r, case.round_bytes))
                result = f.offset(out, f.times(f.binary("mul", done, rows), size))
                valid = f.binary("sub", tokens, done)
                f.do(f"call void @rows({here}, {codes}, {scales}, {zeros}, {result}, {rows}, {valid}, {first}, {last})")
                return []

            f.loop(num_rounds, [], round_)
            return [f.value("i64", f"atomicrmw add {counter}, i64 1 monotonic")]

        taken = f.while_less(carried[0], end, turn)
        return [taken, end]

    first = f.value("i64", f"atomicrmw add {counter}, i64 1 monotonic")
    f.loop(fields["num_matrices"], [first, Value("i64", "0")], matrix)
    f.end()


def _rounds(f: Function, case: MatmulCase, tokens: Value) -> Value:
    return f.binary("udiv", f.binary("add", tokens, case.tokens - 1), case.tokens)


def _smaller(f: Function, a: Value, b: Value) -> Value:
    less = f.value("i1", f"icmp slt {a}, {b.name}")
    return f.value("i64", f"select {less}, {a}, {b}")
