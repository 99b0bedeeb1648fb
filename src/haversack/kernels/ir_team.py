"""LLVM IR of a kernel's entry that shares its work among a team of threads.

    entry(..., parallel, threads)

A team takes *turns* from a counter. Turns of rows are not equal: a first round gives every thread one turn, together
half of all rows, the next round half of the rest, and so on down to turns of `SMALLEST_TURN_BYTES`. Each thread so
reads long runs of addresses, which prefetches need (every end of a turn wastes what was asked for beyond it: turns of
64 KiB ran at 38 GB/s with two threads where these reach 57), and the last turns are short, so that threads end
together though one was held up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from haversack.kernels.ir import Function, Module, Value

SMALLEST_TURN_BYTES = 64 << 10
"""Bytes read in one of the last turns: some microseconds of work."""

BLOCK_ROWS = 4
"""Turns of rows begin at multiples of this: kernels compute rows in blocks."""

TEAM_ARGUMENTS = [("ptr", "parallel"), ("i32", "threads")]
"""Last arguments of every entry: `GOMP_parallel` or null, and the number of threads (`threads.py`)."""


def add_team_entry(
    module: Module,
    name: str,
    arguments: Sequence[tuple[str, str]],
    prepare: Callable[[Function], Mapping[str, Value]],
    turn: Callable[[Function, dict[str, Value], Value], None],
    *,
    own_slots: bool = False,
) -> None:
    """An entry that calls `turn(f, fields, number)` for numbers 0, 1, ... `num_turns` - 1, each in one thread.

    `prepare(f)` is written first, for one thread, and returns values that turns want beside the arguments; one of them
    is `num_turns`. `fields` are those and the arguments, `threads` as i64. Every one is a pointer or an i64. With `own_slots`,
    field `slot` is a number below `threads` that no other thread has.
    """
    f = Function(module, name, [*arguments, *TEAM_ARGUMENTS])
    fields = {n: f.arguments[n] for _, n in arguments}
    fields["threads"] = f.cast("sext", f.arguments["threads"], "i64")
    fields |= prepare(f)
    job = f.value("ptr", f"alloca [{len(fields) + _COUNTERS} x i64], align 64")
    for i in range(_COUNTERS):
        f.store(Value("i64", "0"), f.offset(job, 8 * i), 8)
    for i, value in enumerate(fields.values()):
        f.store(value, f.offset(job, 8 * (i + _COUNTERS)), 8)
    parallel, threads = f.arguments["parallel"], f.arguments["threads"]
    given = f.value("i1", f"icmp ne {parallel}, null")
    together = f.binary("and", given, f.value("i1", f"icmp sgt {threads}, 1"))
    f.when(together, lambda: f.do(f"call void {parallel.name}(ptr @work_{name}, {job}, {threads}, i32 0)"))
    # After a team this finds no turn left; without one it does them all.
    f.do(f"call void @work_{name}({job})")
    f.end()
    _add_work(module, name, {n: v.type for n, v in fields.items()}, turn, own_slots)


_COUNTERS = 2
"""First words of a job: turns taken, and slots."""


def add_record_entry(
    module: Module,
    words: Sequence[tuple[str, str]],
    num_turns: Callable[[Function, dict[str, Value]], Value],
    turn: Callable[[Function, dict[str, Value], Value], None],
) -> None:
    """`run(record, parallel, threads)`: as `add_team_entry`, with arguments that lie in an array of 64-bit words.

    `words` are their types and names; both functions get them by name.
    """

    def read(f: Function, record: Value) -> dict[str, Value]:
        return {name: f.load(type_, f.offset(record, 8 * i), 8) for i, (type_, name) in enumerate(words)}

    add_team_entry(
        module,
        "run",
        [("ptr", "record")],
        lambda f: {"num_turns": num_turns(f, read(f, f.arguments["record"]))},
        lambda f, fields, number: turn(f, read(f, fields["record"]), number),
    )


def _add_work(
    module: Module,
    name: str,
    types: Mapping[str, str],
    turn: Callable[[Function, dict[str, Value], Value], None],
    own_slots: bool,
) -> None:
    """`work_name(job)`: one thread's turns, until there are none left. The slot beyond the last is the caller's, who then finds
    no turn left."""
    f = Function(module, f"work_{name}", [("ptr", "job")])
    job = f.arguments["job"]
    fields = {n: f.load(t, f.offset(job, 8 * (i + _COUNTERS)), 8) for i, (n, t) in enumerate(types.items())}
    if own_slots:
        fields["slot"] = f.value("i64", f"atomicrmw add {f.offset(job, 8)}, i64 1 monotonic")

    def take() -> Value:
        return f.value("i64", f"atomicrmw add {job}, i64 1 monotonic")

    def body(state: list[Value]) -> list[Value]:
        turn(f, fields, state[0])
        return [take()]

    f.while_less(take(), fields["num_turns"], body)
    f.end()


def num_turns_of_rows(f: Function, rows: Value, row_bytes: int, threads: Value) -> Value:
    """Turns for `rows` rows: one for a lone thread, else a round of `threads` for every halving, and one for the rest."""
    smallest = f.binary("mul", threads, SMALLEST_TURN_BYTES)
    times = f.binary("or", f.binary("udiv", f.times(rows, row_bytes), smallest), 1)
    leading = f.call("i64", "llvm.ctlz.i64", times, Value("i1", "true"))
    rounds = f.value("i64", f"sub i64 64, {leading.name}")
    alone = f.value("i1", f"icmp sle {threads}, 1")
    return f.value("i64", f"select {alone}, i64 1, {f.binary('mul', rounds, threads)}")


def rows_of_turn(f: Function, fields: Mapping[str, Value], rows: Value, turn: Value) -> tuple[Value, Value]:
    """First row and end of a turn, among `rows` rows. Both are multiples of `BLOCK_ROWS`, but for the last end."""
    threads = fields["threads"]
    last_round = f.binary("sub", f.binary("udiv", fields["num_turns"], threads), 1)
    round_ = f.binary("udiv", turn, threads)
    member = f.binary("sub", turn, f.binary("mul", round_, threads))
    blocks = f.binary("udiv", f.binary("add", rows, BLOCK_ROWS - 1), BLOCK_ROWS)
    left = f.binary("lshr", blocks, round_)
    after = f.binary("lshr", left, 1)
    is_last = f.value("i1", f"icmp eq {round_}, {last_round.name}")
    kept = f.value("i64", f"select {is_last}, i64 0, {after}")
    width, done = f.binary("sub", left, kept), f.binary("sub", blocks, left)

    def edge(number: Value) -> Value:
        block = f.binary("add", done, f.binary("udiv", f.binary("mul", width, number), threads))
        return smaller(f, f.times(block, BLOCK_ROWS), rows)

    return edge(member), edge(f.binary("add", member, 1))


def smaller(f: Function, a: Value, b: Value) -> Value:
    less = f.value("i1", f"icmp slt {a}, {b.name}")
    return f.value("i64", f"select {less}, {a}, {b}")
