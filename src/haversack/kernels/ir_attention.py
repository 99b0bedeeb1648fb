"""LLVM IR of decode-time attention of one new token per sequence over a stored cache: for any CPU, by plain vectors.

    attend(job)                        one thread's share of the units, until there are none left
    combine(job)                       one thread's share of the items, likewise; after every `attend` has ended
    run(job, parallel, threads)        both, by a team

An *item* is one sequence's KV head with up to eight of the query rows that share it; a *unit* is one of its `splits`
parts along the context (Dao et al. 2023, "Flash-Decoding"), so that few heads still use every core. A unit leaves a
running maximum, sum and output (streaming softmax, Milakov and Gimelshein 2018, arXiv 1805.02867), which `combine` puts
together. Per block of packed tokens, keys' scales are folded into the queries once (per-channel keys share them over the
block), so that a score is a dot product with bare codes; values' scales are folded into the probabilities, so that the
output sums bare codes. Everything is float32; exp is a polynomial of degree 6, 2^-22 of its value.

What a sequence sees is worked out here from its two counts, as `haversack.parts.kv.layer` says: packed groups, sinks, the
ring, and the new token, which is not stored yet.
"""

from __future__ import annotations

from collections.abc import Callable

from haversack.kernels import ir_packed_tokens
from haversack.kernels.dot_schemes import multiply_add
from haversack.kernels.ir import Function, Module, Value, splat_constant, zeros
from haversack.kernels.ir_attention_block import add_block
from haversack.kernels.ir_attention_case import PLAIN_BLOCK_TOKENS, TENSORS, AttentionCase, TokenBlock, row_bytes_of
from haversack.kernels.ir_float import float_bytes
from haversack.kernels.ir_math import (
    at_least,
    exponential,
    larger,
    larger_int,
    load_floats,
    multiply_add_scalar,
    smaller_int,
    smaller_than,
    store_floats,
)

_F16 = "<16 x float>"

JOB = (
    "next_unit", "next_item",
    "query", "query_stride", "new_keys", "new_key_stride", "new_key_head_stride",
    "new_values", "new_value_stride", "new_value_head_stride",
    "out", "out_stride", "lse", "logits", "scaling", "num_rows", "num_kv_heads", "num_slab_heads", "splits", "partials",
    "counts", "packed_until", "sink_tokens", "ring_tokens", "recent_tokens",
    "keys", "values", "slots", "num_groups", *TENSORS,
)  # fmt: skip
"""64-bit words of a job. Strides are bytes between sequences, or between their heads. `scaling` is a float's bits; `lse`
`(rows, heads)` and the sinks' `logits` `(heads,)`, both float32, may be null, and so may the new tokens. `counts` and
`packed_until` are one 64-bit integer per sequence. Slabs are contiguous, as their parts declare them, `slots` long; of their
`num_slab_heads` heads a job attends to `num_kv_heads`, and what it reads and writes begins at the first of those."""

_COUNTS = {n for n in JOB if n.endswith(("stride", "tokens")) or n.startswith("num_")} | {"splits", "slots"}


def attention_text(case: AttentionCase) -> str:
    """The whole module, entries `attend`, `combine` and `run`."""
    module = Module()
    plain = TokenBlock(case.dtype, case.dtype, PLAIN_BLOCK_TOKENS, 1)
    add_block(module, case, plain, "plain_block")
    if case.is_packed:
        packed = TokenBlock(str(case.key_bits), str(case.value_bits), case.group_size, case.value_groups)
        add_block(module, case, packed, "packed_block")
    _add_unit(module, case)
    _add_combined_item(module, case)
    _add_turns(
        module,
        "attend",
        "next_unit",
        "unit",
        lambda f, job: f.binary("mul", _num_items(f, case, job), _word(f, job, "splits")),
    )
    _add_turns(module, "combine", "next_item", "combined_item", lambda f, job: _num_items(f, case, job))
    f = Function(module, "run", [("ptr", "job"), ("ptr", "parallel"), ("i32", "threads")])
    job, parallel, threads = f.arguments["job"], f.arguments["parallel"], f.arguments["threads"]
    for counter in ("next_unit", "next_item"):
        f.store(Value("i64", "0"), f.offset(job, 8 * JOB.index(counter)), 8)
    given = f.value("i1", f"icmp ne {parallel}, null")
    together = f.binary("and", given, f.value("i1", f"icmp sgt {threads}, 1"))
    f.when(together, lambda: f.do(f"call void {parallel.name}(ptr @attend, {job}, {threads}, i32 0)"))
    f.do(f"call void @attend({job})")  # after a team this finds no unit left
    f.do(f"call void @combine({job})")
    f.end()
    return module.text()


def _word(f: Function, job: Value, name: str) -> Value:
    type_ = "i64" if name in _COUNTS else "float" if name == "scaling" else "ptr"
    return f.load(type_, f.offset(job, 8 * JOB.index(name)), 8)


def _num_items(f: Function, case: AttentionCase, job: Value) -> Value:
    heads = f.binary("mul", _word(f, job, "num_rows"), _word(f, job, "num_kv_heads"))
    return f.times(heads, case.row_rounds)


def _add_turns(module: Module, name: str, counter: str, work: str, count: Callable[[Function, Value], Value]) -> None:
    """`name(job)`: call `work(job, number)` for numbers taken from `counter`, until there are none left."""
    f = Function(module, name, [("ptr", "job")])
    job = f.arguments["job"]
    place = f.offset(job, 8 * JOB.index(counter))

    def take() -> Value:
        return f.value("i64", f"atomicrmw add {place}, i64 1 monotonic")

    def turn(state: list[Value]) -> list[Value]:
        f.do(f"call void @{work}({job}, {state[0]})")
        return [take()]

    f.while_less(take(), count(f, job), turn)
    f.end()


def _add_unit(module: Module, case: AttentionCase) -> None:
    """`unit(job, number)`: one part of one item's tokens, into its place among the partial results."""
    f = Function(module, "unit", [("ptr", "job"), ("i64", "number")])
    job, number = f.arguments["job"], f.arguments["number"]
    splits = _word(f, job, "splits")
    item, split = f.binary("udiv", number, splits), f.binary("urem", number, splits)
    row, kv_head, first_head = _item_place(f, case, job, item)
    size = float_bytes(case.dtype)
    state = f.offset(_word(f, job, "partials"), f.times(number, case.state_bytes))
    _clear_state(f, case, state)
    query_bytes = 4 * case.rows * case.key_head_dim
    ordered_bytes = 0 if case.key_chunks is None else case.rows * case.key_chunks.ordered_bytes
    query = f.value("ptr", f"alloca [{query_bytes + ordered_bytes} x i8], align 64")  # as it is, and as chunks want it
    source = f.offset(_word(f, job, "query"), f.binary("mul", row, _word(f, job, "query_stride")))
    source = f.offset(source, f.times(first_head, case.key_head_dim * size))
    scaling = f.splat(_word(f, job, "scaling"), 16)

    def scale(i: Value, _: list[Value]) -> list[Value]:
        x = load_floats(f, case.dtype, f.offset(source, f.times(i, size)), case.target)
        f.store(f.binary("fmul", x, scaling), f.offset(query, f.times(i, 4)), 64)
        return []

    f.loop(case.rows * case.key_head_dim, [], scale, step=16)
    if case.key_chunks is not None:
        ir_packed_tokens.order_query(f, case.key_chunks, query, f.offset(query, query_bytes), case.rows)

    slab = f.binary("add", f.binary("mul", row, _word(f, job, "num_slab_heads")), kv_head)  # of all slabs' heads
    sinks, ring = _word(f, job, "sink_tokens"), _word(f, job, "ring_tokens")
    count = f.load("i64", f.offset(_word(f, job, "counts"), f.times(row, 8)), 8)
    seen = f.binary("sub", count, sinks)  # ordinals below this have been stored, unless negative
    oldest = at_least(f, f.binary("sub", seen, _word(f, job, "recent_tokens")), 0)
    slots = f.binary("mul", slab, _word(f, job, "slots"))
    key_bytes, value_bytes = case.key_head_dim * size, case.value_head_dim * size
    keys = f.offset(_word(f, job, "keys"), f.times(slots, key_bytes))
    values = f.offset(_word(f, job, "values"), f.times(slots, value_bytes))

    def part(length: Value, which: Value) -> Value:
        """Where part `which` of `splits` begins in a row of `length`."""
        return f.binary("udiv", f.binary("mul", length, which), splits)

    def plain(slot: Value, length: Value, before_end: Value | None = None) -> None:
        """`length` tokens from `slot` on; after `before_end` of them, from the ring's first slot."""
        given = []
        for base, width in ((keys, key_bytes), (values, value_bytes)):
            start = f.offset(base, f.times(slot, width))
            behind = start
            if before_end is not None:  # so that token t of the block lies t rows after either
                behind = f.offset(base, f.times(f.binary("sub", sinks, before_end), width))
            given += [start, behind]
        turn = length if before_end is None else before_end
        f.do(f"call void @plain_block({query}, {', '.join(map(str, given))}, {turn}, {length}, {state})")

    after = f.binary("add", split, 1)
    first_plain = oldest
    if case.is_packed:
        first_plain = _packed_groups(f, case, job, query, state, row, slab, oldest, part, split, after)
    first_plain = larger_int(f, first_plain, f.binary("sub", seen, ring))
    # sinks go before the ring where it begins at its first slot: then blocks are those of a cache without sinks
    num_sinks = smaller_int(f, sinks, count)
    begins = f.value("i1", f"icmp eq {f.binary('urem', first_plain, ring)}, 0")
    together = f.value("i64", f"select {begins}, {num_sinks}, i64 0")
    length = f.binary("add", at_least(f, f.binary("sub", seen, first_plain), 0), together)
    end = part(length, after)

    def stretch(carried: list[Value]) -> list[Value]:
        """A block of the ring, around its end if need be, so that blocks are those of an endless cache."""
        within = f.binary("urem", f.binary("add", first_plain, carried[0]), ring)
        slot = f.value("i64", f"select {begins}, {carried[0]}, {f.binary('add', sinks, within)}")
        length = smaller_than(f, f.binary("sub", end, carried[0]), PLAIN_BLOCK_TOKENS)
        left = f.value("i64", f"select {begins}, {length}, {f.binary('sub', ring, within)}")
        plain(slot, length, left)
        return [f.binary("add", carried[0], length)]

    f.while_less(part(length, split), end, stretch)
    alone = f.binary("sub", num_sinks, together)
    first_part = f.value("i1", f"icmp eq {split}, 0")
    f.when(first_part, lambda: _sinks_and_new(f, job, query, state, row, kv_head, alone, plain))
    f.end()


def _sinks_and_new(
    f: Function,
    job: Value,
    query: Value,
    state: Value,
    row: Value,
    kv_head: Value,
    num_sinks: Value,
    plain: Callable[[Value, Value], None],
) -> None:
    """The first tokens, and the one that is not stored yet."""

    def sinks(first: Value, _: list[Value]) -> list[Value]:
        plain(first, smaller_than(f, f.binary("sub", num_sinks, first), PLAIN_BLOCK_TOKENS))
        return []

    f.loop(num_sinks, [], sinks, step=PLAIN_BLOCK_TOKENS)
    new_keys = _word(f, job, "new_keys")

    def new() -> None:
        places = []
        for name, base in (("key", new_keys), ("value", _word(f, job, "new_values"))):
            at = f.offset(base, f.binary("mul", row, _word(f, job, f"new_{name}_stride")))
            places.append(f.offset(at, f.binary("mul", kv_head, _word(f, job, f"new_{name}_head_stride"))))
        given = f"{places[0]}, {places[0]}, {places[1]}, {places[1]}"
        f.do(f"call void @plain_block({query}, {given}, i64 1, i64 1, {state})")

    f.when(f.value("i1", f"icmp ne {new_keys}, null"), new)


def _packed_groups(
    f: Function,
    case: AttentionCase,
    job: Value,
    query: Value,
    state: Value,
    row: Value,
    slab: Value,
    oldest: Value,
    part: Callable[[Value, Value], Value],
    split: Value,
    after: Value,
) -> Value:
    """This part of the packed groups; returns the first ordinal that is not packed, or not seen before it."""
    size, num_groups = case.group_size, _word(f, job, "num_groups")
    until = f.load("i64", f.offset(_word(f, job, "packed_until"), f.times(row, 8)), 8)
    oldest_packed = larger_int(f, oldest, f.binary("sub", until, f.times(num_groups, size)))
    first = f.binary("udiv", oldest_packed, size)
    groups = at_least(f, f.binary("sub", f.binary("udiv", until, size), first), 0)
    row_bytes = [
        row_bytes_of(str(case.key_bits), case.key_head_dim),
        row_bytes_of(str(case.value_bits), case.value_head_dim),
    ]
    group_bytes = [
        size * row_bytes[0], 2 * case.key_head_dim, 2 * case.key_head_dim,
        size * row_bytes[1], 2 * size * case.value_groups, 2 * size * case.value_groups,
    ]  # fmt: skip
    begin = f.binary("mul", slab, num_groups)
    bases = [_word(f, job, name) for name in TENSORS]

    def group(g: Value, _: list[Value]) -> list[Value]:
        slot = f.binary("add", begin, f.binary("urem", g, num_groups))
        given = [f.offset(base, f.times(slot, n)) for base, n in zip(bases, group_bytes, strict=True)]
        skip = at_least(f, f.binary("sub", oldest_packed, f.times(g, size)), 0)
        f.do(f"call void @packed_block({query}, {', '.join(map(str, given))}, {skip}, {state})")
        return []

    f.loop(f.binary("add", first, part(groups, after)), [], group, first=f.binary("add", first, part(groups, split)))
    return larger_int(f, oldest, until)


def _item_place(f: Function, case: AttentionCase, job: Value, item: Value) -> tuple[Value, Value, Value]:
    """Sequence, KV head and first query head of an item."""
    num_kv_heads = _word(f, job, "num_kv_heads")
    head = f.binary("udiv", item, case.row_rounds)
    row, kv_head = f.binary("udiv", head, num_kv_heads), f.binary("urem", head, num_kv_heads)
    within = f.binary("urem", item, f.times(num_kv_heads, case.row_rounds))
    return row, kv_head, f.times(within, case.rows)


def _clear_state(f: Function, case: AttentionCase, state: Value) -> None:
    lowest = "0xC7EFFFFFE0000000"  # the most negative finite number: shrinking from it gives zero
    f.store(splat_constant("<8 x float>", lowest), state, 4)
    f.store(zeros("<8 x float>"), f.offset(state, 32), 4)

    def clear(i: Value, _: list[Value]) -> list[Value]:
        f.store(zeros(_F16), f.offset(f.offset(state, 64), i), 4)
        return []

    f.loop(4 * case.rows * case.value_head_dim, [], clear, step=64)


def _add_combined_item(module: Module, case: AttentionCase) -> None:
    """`combined_item(job, item)`: its units' states to output rows and log-sum-exps."""
    f = Function(module, "combined_item", [("ptr", "job"), ("i64", "item")])
    job, item = f.arguments["job"], f.arguments["item"]
    splits = _word(f, job, "splits")
    row, _, first_head = _item_place(f, case, job, item)
    states = f.offset(_word(f, job, "partials"), f.times(f.binary("mul", item, splits), case.state_bytes))
    size, width = float_bytes(case.dtype), case.value_head_dim
    out = f.offset(_word(f, job, "out"), f.binary("mul", row, _word(f, job, "out_stride")))
    out = f.offset(out, f.times(first_head, width * size))
    heads = f.times(f.times(_word(f, job, "num_kv_heads"), case.row_rounds), case.rows)
    number = f.binary("add", f.binary("mul", row, heads), first_head)
    lse, logits = _word(f, job, "lse"), _word(f, job, "logits")
    lowest = Value("float", "0xC7EFFFFFE0000000")
    for r in range(case.rows):

        def highest(s: Value, carried: list[Value], r: int = r) -> list[Value]:
            top = f.load("float", f.offset(f.offset(states, f.times(s, case.state_bytes)), 4 * r), 4)
            return [larger(f, top, carried[0])]

        top = f.loop(splits, [lowest], highest)[0]

        def add(s: Value, carried: list[Value], r: int = r, top: Value = top) -> list[Value]:
            state = f.offset(states, f.times(s, case.state_bytes))
            own = f.load("float", f.offset(state, 4 * r), 4)
            share = exponential(f, f.splat(f.binary("fsub", own, top), 16))
            total = f.load("float", f.offset(state, 32 + 4 * r), 4)
            one = f.value("float", f"extractelement {share}, i32 0")
            rows = [
                multiply_add(f, f.load(_F16, f.offset(state, 64 + 4 * (r * width + 16 * c)), 4), share, lanes)
                for c, lanes in enumerate(carried[1:])
            ]
            return [multiply_add_scalar(f, total, one, carried[0]), *rows]

        total, *lanes = f.loop(splits, [Value("float", "0.0"), *[zeros(_F16)] * (width // 16)], add)

        def write_lse(r: int = r, top: Value = top, total: Value = total) -> None:
            place = f.offset(lse, f.times(f.binary("add", number, r), 4))
            f.store(f.binary("fadd", top, _log(f, total)), place, 4)

        f.when(f.value("i1", f"icmp ne {lse}, null"), write_lse)
        given = f.value("i1", f"icmp ne {logits}, null")
        # without sinks this reads the maximum itself, whose share is then not added
        safe = f.value(
            "ptr",
            f"select {given}, {f.offset(logits, f.times(f.binary('add', first_head, r), 4))}, {f.offset(states, 4 * r)}",
        )
        logit = f.load("float", safe, 4)
        logit = f.value("float", f"select {given}, {logit}, {lowest}")
        new_top = larger(f, logit, top)
        shrink = exponential(f, f.splat(f.binary("fsub", top, new_top), 16))
        extra = exponential(f, f.splat(f.binary("fsub", logit, new_top), 16))
        extra = f.value("float", f"extractelement {extra}, i32 0")
        extra = f.value("float", f"select {given}, {extra}, float 0.0")
        one = f.value("float", f"extractelement {shrink}, i32 0")
        tiny = Value("float", "0x3810000000000000")
        bottom = larger(f, multiply_add_scalar(f, total, one, extra), tiny)
        inverse = f.binary("fdiv", shrink, f.splat(bottom, 16))
        for c, value in enumerate(lanes):
            store_floats(
                f, case.dtype, f.binary("fmul", value, inverse), f.offset(out, size * (r * width + 16 * c)), case.target
            )
    f.end()


def _log(f: Function, x: Value) -> Value:
    """Natural logarithm, once per row: the C library's."""
    return f.call("float", "logf", x)
