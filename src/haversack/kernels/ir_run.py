"""LLVM IR of a kernel's entry: prepare the activations, then let a team of threads take turns of rows.

    run(x, workspace, matrices, num_matrices, tokens, parallel, threads)

`matrices` is an array of six 64-bit words each: codes, scales, zeros, out, rows, stride. Several matrices that read the same
activations (query, key and value; gate and up) are one call: prepared once, one start of the team. `out` of a matrix is
`(tokens, rows)`, with `stride` elements from token to token.
"""

from __future__ import annotations

from haversack.kernels.ir import Function, Module, Value
from haversack.kernels.ir_matmul import MatmulCase, add_rows
from haversack.kernels.ir_prepare import add_prepare
from haversack.kernels.ir_team import (
    BLOCK_ROWS,
    TEAM_ARGUMENTS,
    add_team_entry,
    num_turns_of_rows,
    rows_of_turn,
    smaller,
)

RUN_ARGUMENTS = [("ptr", "x"), ("ptr", "workspace"), ("ptr", "matrices"), ("i64", "num_matrices"), ("i64", "tokens")]

ENTRY_ARGUMENTS = [*RUN_ARGUMENTS, *TEAM_ARGUMENTS]
"""All arguments of `run`, for whoever prepares a call."""

MATRIX_WORDS = 6
"""64-bit words per matrix: codes, scales, zeros, out, rows, stride."""


def matmul_text(case: MatmulCase) -> str:
    """The whole module, entry `run`."""
    module = Module()
    add_prepare(module, case)
    add_rows(module, case)
    add_team_entry(module, "run", RUN_ARGUMENTS, lambda f: _prepare(f, case), lambda f, a, t: _turn(f, case, a, t))
    return module.text()


def _prepare(f: Function, case: MatmulCase) -> dict[str, Value]:
    """Lay the activations of all tokens out; count the rows of all matrices."""
    a = f.arguments
    address = f.cast("ptrtoint", a["workspace"], "i64")
    scratch = f.cast("inttoptr", f.binary("and", f.binary("add", address, 63), -64), "ptr")
    rounds = f.offset(scratch, case.scratch_bytes)
    token_bytes = case.fmt.in_features * (4 if case.dtype == "float32" else 2)

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

    f.loop(_rounds(f, case, a["tokens"]), [], round_)

    def count(m: Value, carried: list[Value]) -> list[Value]:
        return [f.binary("add", carried[0], _whole_blocks(f, _rows_of_matrix(f, a["matrices"], m)))]

    rows = f.loop(a["num_matrices"], [Value("i64", "0")], count)[0]
    threads = f.cast("sext", a["threads"], "i64")
    return {"rounds": rounds, "rows": rows, "num_turns": num_turns_of_rows(f, rows, case.fmt.row_bytes, threads)}


def _turn(f: Function, case: MatmulCase, fields: dict[str, Value], turn: Value) -> None:
    """The rows of one turn. They are numbered through all matrices, each of which begins at a whole block."""
    turn_first, turn_last = rows_of_turn(f, fields, fields["rows"], turn)
    tokens = fields["tokens"]
    num_rounds = _rounds(f, case, tokens)
    size = 4 if case.dtype == "float32" else 2
    pass_rows = case.pass_rows
    part_bytes = pass_rows // case.block_rows * case.asked_block_bytes(case.block_rows)

    def matrix(m: Value, carried: list[Value]) -> list[Value]:
        """`carried` is the number of this matrix's first row."""
        at = f.offset(fields["matrices"], f.times(m, 8 * MATRIX_WORDS))
        codes, scales, zeros, out = (f.load("ptr", f.offset(at, 8 * i), 8) for i in range(4))
        rows, stride = _rows_of_matrix(f, fields["matrices"], m), f.load("i64", f.offset(at, 40), 8)
        first = f.call("i64", "llvm.smax.i64", f.binary("sub", turn_first, carried[0]), Value("i64", "0"))
        last = smaller(f, f.binary("sub", turn_last, carried[0]), rows)

        def pass_(start: Value, _: list[Value]) -> list[Value]:
            end = smaller(f, f.binary("add", start, pass_rows), last)
            # At the end of a turn, rows that are there already: the next ones are another thread's.
            more = f.value("i1", f"icmp slt {end}, {last.name}")
            next_row = f.value("i64", f"select {more}, {end}, {start}")
            next_codes = f.offset(codes, f.times(next_row, case.fmt.row_bytes))

            def round_(r: Value, _: list[Value]) -> list[Value]:
                part = f.binary("and", r, case.rounds - 1)
                ask = next_codes if case.rounds == 1 else f.offset(next_codes, f.times(part, part_bytes))
                done = f.times(r, case.tokens)
                here = f.offset(fields["rounds"], f.times(r, case.round_bytes))
                result = f.offset(out, f.times(f.binary("mul", done, stride), size))
                valid = f.binary("sub", tokens, done)
                given = [here, codes, scales, zeros, result, stride, valid, ask, start, end]
                f.do(f"call void @rows({', '.join(map(str, given))})")
                return []

            f.loop(num_rounds, [], round_)
            return []

        f.loop(last, [], pass_, first=first, step=pass_rows)
        return [f.binary("add", carried[0], _whole_blocks(f, rows))]

    f.loop(fields["num_matrices"], [Value("i64", "0")], matrix)


def _rows_of_matrix(f: Function, matrices: Value, m: Value) -> Value:
    return f.load("i64", f.offset(f.offset(matrices, f.times(m, 8 * MATRIX_WORDS)), 32), 8)


def _whole_blocks(f: Function, rows: Value) -> Value:
    return f.binary("and", f.binary("add", rows, BLOCK_ROWS - 1), -BLOCK_ROWS)


def _rounds(f: Function, case: MatmulCase, tokens: Value) -> Value:
    return f.binary("udiv", f.binary("add", tokens, case.tokens - 1), case.tokens)
