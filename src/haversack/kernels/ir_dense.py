"""LLVM IR of products of few tokens with a matrix in bfloat16: every weight is read once, in the order of addresses.

    run(job, parallel, threads)

`job` is an array of 64-bit words, in the order of `JOB`. A word of 32 bits holds two neighbouring columns: shifted up it is the float32 of the first,
with its lower half cleared that of the second. So activations are laid out once per call, even columns apart from odd ones, and four
instructions multiply 32 weights by a token. Rows are shared among a team of threads as those of packed matrices are (`ir_team.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from haversack.kernels.dot_schemes import multiply_add
from haversack.kernels.ir import Function, Module, Value, splat_constant, zeros
from haversack.kernels.ir_float import bf16_of, sum_of_lanes
from haversack.kernels.ir_team import add_team_entry, num_turns_of_rows, rows_of_turn
from haversack.kernels.llvm import Target

JOB = ("x", "laid_out", "weight", "out", "rows", "out_stride")
"""Words of a job: bfloat16 `(tokens, columns)`; room for them in float32; bfloat16 `(rows, columns)`; bfloat16 `(tokens, rows)`, and the elements from one token to
the next."""

STEP_COLUMNS = 32
"""Columns of one vector: a matrix has whole steps."""

MOST_TOKENS = 4
"""Tokens that a weight is multiplied with while it is read once."""

PREFETCH_BYTES = 8 << 10
"""How far ahead weights are asked for, as for packed rows (`ir_matmul.py`)."""

_WORDS, _FLOATS = "<16 x i32>", "<16 x float>"
_POINTERS = ("x", "laid_out", "weight", "out")


def workspace_bytes(num_tokens: int, columns: int) -> int:
    """Of activations in float32; none for more tokens than are multiplied so."""
    return 4 * num_tokens * columns if num_tokens <= MOST_TOKENS else 0


def dense_text(columns: int, tokens: int, target: Target) -> str:
    """The whole module, entry `run`, for `tokens` activations of `columns`, a multiple of `STEP_COLUMNS`."""
    module = Module()
    add_team_entry(
        module,
        "run",
        [("ptr", "job")],
        lambda f: _prepare(f, columns, tokens),
        lambda f, fields, turn: _turn(f, _job(f, fields["job"]), fields, turn, columns, tokens, target),
    )
    return module.text()


def _job(f: Function, record: Value) -> dict[str, Value]:
    types = ["ptr" if name in _POINTERS else "i64" for name in JOB]
    return {
        name: f.load(type_, f.offset(record, 8 * i), 8) for i, (name, type_) in enumerate(zip(JOB, types, strict=True))
    }


def _prepare(f: Function, columns: int, tokens: int) -> dict[str, Value]:
    """Lay all activations out: of each step, sixteen even columns, then the sixteen odd ones between them."""
    at = _job(f, f.arguments["job"])

    def lay_out(i: Value, _: list[Value]) -> Sequence[Value]:
        even, odd = _pairs(f, f.offset(at["x"], f.times(i, 2 * STEP_COLUMNS)))
        place = f.offset(at["laid_out"], f.times(i, 4 * STEP_COLUMNS))
        f.store(even, place, 4)
        f.store(odd, f.offset(place, 2 * STEP_COLUMNS), 4)
        return []

    f.loop(tokens * columns // STEP_COLUMNS, [], lay_out)
    threads = f.cast("sext", f.arguments["threads"], "i64")
    return {"num_turns": num_turns_of_rows(f, at["rows"], 2 * columns, threads)}


def _pairs(f: Function, pointer: Value) -> tuple[Value, Value]:
    """Even and odd columns of a step, in float32."""
    words = f.load(_WORDS, pointer)
    even = f.binary("shl", words, splat_constant(_WORDS, 16))
    odd = f.binary("and", words, splat_constant(_WORDS, -65536))
    return f.cast("bitcast", even, _FLOATS), f.cast("bitcast", odd, _FLOATS)


def _turn(
    f: Function,
    at: dict[str, Value],
    fields: dict[str, Value],
    turn: Value,
    columns: int,
    tokens: int,
    target: Target,
) -> None:
    first, last = rows_of_turn(f, fields, at["rows"], turn)
    steps = columns // STEP_COLUMNS
    abreast = next(n for n in (4, 2, 1) if steps % n == 0 and n * tokens <= 8)

    def row(r: Value, _: list[Value]) -> Sequence[Value]:
        weights = f.offset(at["weight"], f.times(r, 2 * columns))

        def multiply(i: Value, sums: list[Value]) -> list[Value]:
            after = list(sums)
            ahead = f.offset(weights, f.times(i, 2 * STEP_COLUMNS))
            for k in range(abreast):
                here = f.offset(ahead, 2 * STEP_COLUMNS * k)
                _prefetch(f, f.offset(here, PREFETCH_BYTES))
                pairs = _pairs(f, here)
                for t in range(tokens):
                    x = f.offset(at["laid_out"], 4 * columns * t + 4 * STEP_COLUMNS * k)
                    x = f.offset(x, f.times(i, 4 * STEP_COLUMNS))
                    for half, weight in enumerate(pairs):
                        slot = (t * abreast + k) * 2 + half
                        value = f.load(_FLOATS, f.offset(x, 2 * STEP_COLUMNS * half), 4)
                        after[slot] = multiply_add(f, weight, value, after[slot])
            return after

        sums = f.loop(steps, [zeros(_FLOATS)] * (2 * abreast * tokens), multiply, step=abreast)
        for t in range(tokens):
            own = sums[2 * abreast * t : 2 * abreast * (t + 1)]
            while len(own) > 1:
                own = [f.binary("fadd", a, b) for a, b in zip(own[::2], own[1::2], strict=True)]
            element = bf16_of(f, sum_of_lanes(f, own[0]), target)
            place = f.binary("add", f.binary("mul", at["out_stride"], t), r)
            f.store(element, f.offset(at["out"], f.times(place, 2)), 2)
        return []

    f.loop(last, [], row, first=first)


def _prefetch(f: Function, pointer: Value) -> None:
    """Ask for a line that is read once; never faults."""
    f.module.declare("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
    f.do(f"call void @llvm.prefetch.p0({pointer}, i32 0, i32 0, i32 1)")
