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
from dataclasses import dataclass

from haversack.kernels import ir_packed_tokens
from haversack.kernels.dot_schemes import multiply_add
from haversack.kernels.ir import Function, Module, Value, splat_constant, vector, zeros
from haversack.kernels.ir_float import bits_of, converts_half, floats_of, half_to_float
from haversack.kernels.ir_packed_tokens import ChunkForm
from haversack.kernels.llvm import Target

_F16 = "<16 x float>"
PLAIN_BLOCK_TOKENS = 64
"""Tokens between two rescalings where keys and values lie in floats."""

MAX_ROWS = 8
"""Query rows of a KV head that are taken together: as many as leave registers for keys."""

TENSORS = ("key_codes", "key_scales", "key_zeros", "value_codes", "value_scales", "value_zeros")

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


@dataclass(frozen=True)
class AttentionCase:
    """One kernel: `rows` query rows share a KV head at a time, of `row_rounds` times as many.

    `dtype` ("float32", "bfloat16", "float16") is that of queries, new tokens, slabs and output. With bits, tokens that
    left the ring are packed in layout `kv-tokens-v1`: a token's row in planes, with float16 scales and zeros per channel
    and `group_size` tokens for keys, per token and `group_size` channels for values.
    """

    rows: int
    row_rounds: int
    key_head_dim: int
    value_head_dim: int
    dtype: str
    key_bits: int
    value_bits: int
    group_size: int
    softcap: float | None
    target: Target

    @property
    def is_packed(self) -> bool:
        return self.key_bits > 0

    @property
    def value_groups(self) -> int:
        """Groups of channels with a scale of their own."""
        return -(-self.value_head_dim // self.group_size)

    @property
    def key_chunks(self) -> ChunkForm | None:
        """How packed keys are read sixty-four bytes at a time; None where a token's row is read piece by piece."""
        form = ChunkForm(self.key_bits, self.key_head_dim, self.group_size)
        return form if form.is_supported(self.target) else None

    @property
    def value_chunks(self) -> ChunkForm | None:
        """The same for packed values."""
        form = ChunkForm(self.value_bits, self.value_head_dim, self.group_size)
        return form if form.is_supported(self.target) else None

    @property
    def state_bytes(self) -> int:
        """What a unit leaves: a maximum and a sum per row, in eight lanes each, and the rows' outputs."""
        return 64 + 4 * self.rows * self.value_head_dim


@dataclass(frozen=True)
class _Block:
    """How the tokens of one block lie: "float32", "bfloat16", "float16" or bits, and how many at most."""

    key: str
    value: str
    tokens: int
    value_groups: int


def supports(
    key_head_dim: int, value_head_dim: int, dtype: str, key_bits: int, value_bits: int, group_size: int, target: Target
) -> bool:
    """Rows of whole vectors of sixteen, in every plane; float16 where the CPU converts it."""

    def whole(channels: int, bits: int) -> bool:
        return channels % (16 * 8 // bits if bits else 16) == 0

    converts = dtype != "float16" or converts_half(target)
    return (
        dtype in ("float32", "bfloat16", "float16")
        and converts
        and (key_bits > 0) == (value_bits > 0)
        and group_size % 16 == 0
        and whole(key_head_dim, key_bits)
        and whole(value_head_dim, value_bits)
    )


def attention_text(case: AttentionCase) -> str:
    """The whole module, entries `attend`, `combine` and `run`."""
    module = Module()
    plain = _Block(case.dtype, case.dtype, PLAIN_BLOCK_TOKENS, 1)
    _add_block(module, case, plain, "plain_block")
    if case.is_packed:
        packed = _Block(str(case.key_bits), str(case.value_bits), case.group_size, case.value_groups)
        _add_block(module, case, packed, "packed_block")
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
    size = _float_bytes(case.dtype)
    state = f.offset(_word(f, job, "partials"), f.times(number, case.state_bytes))
    _clear_state(f, case, state)
    query_bytes = 4 * case.rows * case.key_head_dim
    ordered_bytes = 0 if case.key_chunks is None else case.rows * case.key_chunks.ordered_bytes
    query = f.value("ptr", f"alloca [{query_bytes + ordered_bytes} x i8], align 64")  # as it is, and as chunks want it
    source = f.offset(_word(f, job, "query"), f.binary("mul", row, _word(f, job, "query_stride")))
    source = f.offset(source, f.times(first_head, case.key_head_dim * size))
    scaling = f.splat(_word(f, job, "scaling"), 16)

    def scale(i: Value, _: list[Value]) -> list[Value]:
        x = _load_floats(f, case.dtype, f.offset(source, f.times(i, size)), case.target)
        f.store(f.binary("fmul", x, scaling), f.offset(query, f.times(i, 4)), 64)
        return []

    f.loop(case.rows * case.key_head_dim, [], scale, step=16)
    if case.key_chunks is not None:
        ir_packed_tokens.order_query(f, case.key_chunks, query, f.offset(query, query_bytes), case.rows)

    slab = f.binary("add", f.binary("mul", row, _word(f, job, "num_slab_heads")), kv_head)  # of all slabs' heads
    sinks, ring = _word(f, job, "sink_tokens"), _word(f, job, "ring_tokens")
    count = f.load("i64", f.offset(_word(f, job, "counts"), f.times(row, 8)), 8)
    seen = f.binary("sub", count, sinks)  # ordinals below this have been stored, unless negative
    oldest = _at_least(f, f.binary("sub", seen, _word(f, job, "recent_tokens")), 0)
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
    first_plain = _larger_int(f, first_plain, f.binary("sub", seen, ring))
    # sinks go before the ring where it begins at its first slot: then blocks are those of a cache without sinks
    num_sinks = _smaller_int(f, sinks, count)
    begins = f.value("i1", f"icmp eq {f.binary('urem', first_plain, ring)}, 0")
    together = f.value("i64", f"select {begins}, {num_sinks}, i64 0")
    length = f.binary("add", _at_least(f, f.binary("sub", seen, first_plain), 0), together)
    end = part(length, after)

    def stretch(carried: list[Value]) -> list[Value]:
        """A block of the ring, around its end if need be, so that blocks are those of an endless cache."""
        within = f.binary("urem", f.binary("add", first_plain, carried[0]), ring)
        slot = f.value("i64", f"select {begins}, {carried[0]}, {f.binary('add', sinks, within)}")
        length = _smaller(f, f.binary("sub", end, carried[0]), PLAIN_BLOCK_TOKENS)
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
        plain(first, _smaller(f, f.binary("sub", num_sinks, first), PLAIN_BLOCK_TOKENS))
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
    oldest_packed = _larger_int(f, oldest, f.binary("sub", until, f.times(num_groups, size)))
    first = f.binary("udiv", oldest_packed, size)
    groups = _at_least(f, f.binary("sub", f.binary("udiv", until, size), first), 0)
    row_bytes = [
        _row_bytes(str(case.key_bits), case.key_head_dim),
        _row_bytes(str(case.value_bits), case.value_head_dim),
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
        skip = _at_least(f, f.binary("sub", oldest_packed, f.times(g, size)), 0)
        f.do(f"call void @packed_block({query}, {', '.join(map(str, given))}, {skip}, {state})")
        return []

    f.loop(f.binary("add", first, part(groups, after)), [], group, first=f.binary("add", first, part(groups, split)))
    return _larger_int(f, oldest, until)


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
    size, width = _float_bytes(case.dtype), case.value_head_dim
    out = f.offset(_word(f, job, "out"), f.binary("mul", row, _word(f, job, "out_stride")))
    out = f.offset(out, f.times(first_head, width * size))
    heads = f.times(f.times(_word(f, job, "num_kv_heads"), case.row_rounds), case.rows)
    number = f.binary("add", f.binary("mul", row, heads), first_head)
    lse, logits = _word(f, job, "lse"), _word(f, job, "logits")
    lowest = Value("float", "0xC7EFFFFFE0000000")
    for r in range(case.rows):

        def highest(s: Value, carried: list[Value], r: int = r) -> list[Value]:
            top = f.load("float", f.offset(f.offset(states, f.times(s, case.state_bytes)), 4 * r), 4)
            return [_larger(f, top, carried[0])]

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
        new_top = _larger(f, logit, top)
        shrink = exponential(f, f.splat(f.binary("fsub", top, new_top), 16))
        extra = exponential(f, f.splat(f.binary("fsub", logit, new_top), 16))
        extra = f.value("float", f"extractelement {extra}, i32 0")
        extra = f.value("float", f"select {given}, {extra}, float 0.0")
        one = f.value("float", f"extractelement {shrink}, i32 0")
        tiny = Value("float", "0x3810000000000000")
        bottom = _larger(f, multiply_add_scalar(f, total, one, extra), tiny)
        inverse = f.binary("fdiv", shrink, f.splat(bottom, 16))
        for c, value in enumerate(lanes):
            _store_floats(
                f, case.dtype, f.binary("fmul", value, inverse), f.offset(out, size * (r * width + 16 * c)), case.target
            )
    f.end()


def _add_block(module: Module, case: AttentionCase, block: _Block, name: str) -> None:
    """`plain_block(query, keys, keys', values, values', turn, count, state)`: `count` tokens, from `turn` on counted from
    the second pointers; or `packed_block(query, <tensors>, skip, state)`: a whole group but its first `skip` tokens.
    Pointers are those of the block's first token."""
    packed = name == "packed_block"
    if packed:
        arguments = [*(("ptr", n) for n in TENSORS), ("i64", "skip")]
    else:
        halves = ("key_codes", "key_codes_behind", "value_codes", "value_codes_behind")
        arguments = [*(("ptr", n) for n in halves), ("i64", "turn"), ("i64", "count")]
    f = Function(module, name, [("ptr", "query"), *arguments, ("ptr", "state")])
    a, rows, size = f.arguments, range(case.rows), block.tokens
    first = a["skip"] if packed else Value("i64", "0")
    count = Value("i64", str(size)) if packed else a["count"]
    score_bytes = 4 * case.rows * size
    scores = f.value("ptr", f"alloca [{score_bytes} x i8], align 64")
    if packed:
        key_chunks, value_chunks = case.key_chunks, case.value_chunks
        query_bytes = 4 * case.rows * case.key_head_dim
        folded_bytes = query_bytes if key_chunks is None else case.rows * key_chunks.ordered_bytes
        folded = f.value("ptr", f"alloca [{folded_bytes} x i8], align 64")  # queries times key scales
        weights = f.value("ptr", f"alloca [{score_bytes * block.value_groups} x i8], align 64")
        expanded_bytes = 0 if value_chunks is None else value_chunks.expanded_bytes(case.rows, size)
        expanded = f.value("ptr", f"alloca [{expanded_bytes} x i8], align 64")
        constants = _key_constants(f, case)
        if key_chunks is None:
            _fold_keys(f, case, folded)
            _write_scores(f, case, block, folded, scores, first, count)
        else:
            ordered = f.offset(a["query"], query_bytes)
            ir_packed_tokens.fold_key_scales(f, key_chunks, ordered, a["key_scales"], folded, case.rows, case.target)
            ir_packed_tokens.write_scores(f, key_chunks, folded, a["key_codes"], scores, case.rows, size, first)
    else:
        weights, value_chunks, constants = scores, None, [Value("float", "0.0")] * case.rows
        _write_scores(f, case, block, a["query"], scores, first, count)
    for r in rows:
        row = f.offset(scores, 4 * size * r)
        tops, totals = f.offset(a["state"], 4 * r), f.offset(a["state"], 32 + 4 * r)
        top, total, shrink = _softmax_row(
            f, case, block, row, constants[r], f.load("float", tops, 4), f.load("float", totals, 4)
        )
        f.store(top, tops, 4)
        f.store(total, totals, 4)
        _fold_values(f, case, block, row, weights, r, shrink)
    if value_chunks is None:
        _add_values(f, case, block, weights, first, count)
    else:
        ir_packed_tokens.expand_weights(f, value_chunks, weights, expanded, case.rows, block.value_groups, size)
        outputs = f.offset(a["state"], 64)
        ir_packed_tokens.add_values(f, value_chunks, expanded, a["value_codes"], outputs, case.rows, size)
    f.end()


def _key_constants(f: Function, case: AttentionCase) -> list[Value]:
    """Per row the sum of queries times the group's key zeros."""
    a = f.arguments

    def add(i: Value, carried: list[Value]) -> list[Value]:
        """Channels i ... i + 15."""
        zero = half_to_float(f, f.load("<16 x i16>", f.offset(a["key_zeros"], f.times(i, 2)), 2), case.target)
        return [
            multiply_add(f, f.load(_F16, f.offset(a["query"], f.binary("add", f.times(i, 4), at)), 64), zero, total)
            for at, total in zip(range(0, 4 * case.rows * case.key_head_dim, 4 * case.key_head_dim), carried)
        ]

    sums = f.loop(case.key_head_dim, [zeros(_F16)] * case.rows, add, step=16)
    return [_sum(f, s) for s in sums]


def _fold_keys(f: Function, case: AttentionCase, folded: Value) -> None:
    """Queries times the group's key scales into `folded`."""

    def fold(i: Value, _: list[Value]) -> list[Value]:
        """Channels i ... i + 15."""
        bits = f.load("<16 x i16>", f.offset(f.arguments["key_scales"], f.times(i, 2)), 2)
        scale = half_to_float(f, bits, case.target)
        for r in range(case.rows):
            where = f.binary("add", f.times(i, 4), 4 * r * case.key_head_dim)
            q = f.load(_F16, f.offset(f.arguments["query"], where), 64)
            f.store(f.binary("fmul", q, scale), f.offset(folded, where), 64)
        return []

    f.loop(case.key_head_dim, [], fold, step=16)


def _write_scores(
    f: Function, case: AttentionCase, block: _Block, folded: Value, scores: Value, first: Value, count: Value
) -> None:
    """Dot products of every row with the block's keys `first ... count - 1`; minus infinity at the others."""
    for i in range(0, case.rows * block.tokens, 16):
        f.store(splat_constant(_F16, "0xFFF0000000000000"), f.offset(scores, 4 * i), 64)
    row_bytes = _row_bytes(block.key, case.key_head_dim)
    abreast = 16  # tokens whose sums are kept in registers
    while abreast > 1 and abreast * case.rows > ir_packed_tokens.MAX_SUMS:
        abreast //= 2

    def sums_of(tokens: list[Value]) -> list[list[Value]]:
        """Per row and token, sixteen lanes that are still to be added."""
        sums = [[zeros(_F16)] * len(tokens) for _ in range(case.rows)]
        parts = [_numbers(f, case, block.key, _token_row(f, "key_codes", t, row_bytes), row_bytes) for t in tokens]
        for same in zip(*parts, strict=True):
            for r in range(case.rows):
                q = f.load(_F16, f.offset(folded, 4 * (r * case.key_head_dim + same[0][0])), 64)
                sums[r] = [multiply_add(f, numbers, q, s) for (_, numbers), s in zip(same, sums[r], strict=True)]
        return sums

    def place(r: int, t: Value) -> Value:
        return f.offset(f.offset(scores, 4 * block.tokens * r), f.times(t, 4))

    def sixteen(t: Value, _: list[Value]) -> list[Value]:
        by_row: list[list[Value]] = [[] for _ in range(case.rows)]
        for start in range(0, 16, abreast):
            found = sums_of([f.binary("add", t, start + i) for i in range(abreast)])
            for row, more in zip(by_row, found, strict=True):
                row += more
        for r, vectors in enumerate(by_row):
            f.store(ir_packed_tokens.merged_sums(f, vectors, 1), place(r, t), 4)
        return []

    def token(t: Value, _: list[Value]) -> list[Value]:
        for r, (lanes,) in enumerate(
            sums_of([t])
        ):  # added as those of sixteen are: a token's score is the same anywhere
            total = ir_packed_tokens.merged_sums(f, [lanes], 1)
            f.store(f.value("float", f"extractelement {total}, i32 0"), place(r, t), 4)
        return []

    f.loop(f.binary("sub", count, 15), [], sixteen, first=first, step=16)
    whole = f.binary("and", _at_least(f, f.binary("sub", count, first), 0), -16)
    f.loop(count, [], token, first=f.binary("add", first, whole))


def _softmax_row(
    f: Function, case: AttentionCase, block: _Block, row: Value, constant: Value, top: Value, total: Value
) -> tuple[Value, Value, Value]:
    """Scores to unnormalised probabilities in place; the new maximum and sum, and what the old ones shrink by."""
    shift = f.splat(constant, 16)
    parts = []
    for i in range(0, block.tokens, 16):
        score = f.binary("fadd", f.load(_F16, f.offset(row, 4 * i), 64), shift)
        parts.append(_capped(f, score, case.softcap) if case.softcap else score)
    highest = parts[0]
    for part in parts[1:]:
        highest = _larger(f, highest, part)
    f.module.declare("declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)")
    block_top = f.value("float", f"call float @llvm.vector.reduce.fmax.v16f32({highest})")
    new_top = _larger(f, block_top, top)
    spread = f.splat(new_top, 16)
    sums = zeros(_F16)
    for i, part in enumerate(parts):
        probability = exponential(f, f.binary("fsub", part, spread))
        f.store(probability, f.offset(row, 64 * i), 64)
        sums = f.binary("fadd", sums, probability)
    shrink_lanes = exponential(f, f.splat(f.binary("fsub", top, new_top), 16))
    shrink = f.value("float", f"extractelement {shrink_lanes}, i32 0")
    return new_top, multiply_add_scalar(f, total, shrink, _sum(f, sums)), shrink


def _fold_values(
    f: Function, case: AttentionCase, block: _Block, row: Value, weights: Value, r: int, shrink: Value
) -> None:
    """Probabilities times value scales into `weights`; shrink the output so far, and add what zeros add to it.

    The zeros' part is the sum over tokens of probability times zero: one number for all channels of the group.
    """
    size, groups, v = block.tokens, block.value_groups, f.arguments
    packed = block.value.isdigit()
    added = [zeros(_F16)] * groups
    for i in range(0, size, 16) if packed else ():
        probability = f.load(_F16, f.offset(row, 4 * i), 64)
        at = 2 * groups * i
        loaded = [f.load(vector(16 * groups, "i16"), f.offset(v[n], at), 2) for n in ("value_scales", "value_zeros")]
        for g in range(groups):
            mask = [lane * groups + g for lane in range(16)]
            scale, zero = (half_to_float(f, f.shuffle(both, None, mask), case.target) for both in loaded)
            place = f.offset(weights, 4 * ((r * groups + g) * size + i))
            f.store(f.binary("fmul", probability, scale), place, 64)
            added[g] = multiply_add(f, probability, zero, added[g])
    spread = f.splat(shrink, 16)
    totals = [f.splat(_sum(f, lanes), 16) if packed else zeros(_F16) for lanes in added]
    for c in range(0, case.value_head_dim, 16):
        place = f.offset(v["state"], 64 + 4 * (r * case.value_head_dim + c))
        group = c // case.group_size if packed else 0
        f.store(multiply_add(f, f.load(_F16, place, 4), spread, totals[group]), place, 4)


def _add_values(
    f: Function,
    case: AttentionCase,
    block: _Block,
    weights: Value,
    first: Value,
    count: Value,
) -> None:
    """Output rows plus weights times the block's values, as much of every token's row at a time as registers hold."""
    size, groups, packed = block.tokens, block.value_groups, block.value.isdigit()
    row_bytes = _row_bytes(block.value, case.value_head_dim)
    base = f.arguments["value_codes"]
    step = 16 if packed else 16 * _float_bytes(block.value)
    pieces = [
        (piece, [c for c, _ in _numbers(None, case, block.value, base, row_bytes, piece)])
        for piece in range(0, row_bytes, step)
    ]
    per_pass = max(1, ir_packed_tokens.MAX_SUMS // (case.rows * len(pieces[0][1])))
    for begin in range(0, len(pieces), per_pass):
        taken = pieces[begin : begin + per_pass]
        channels = [c for _, of_piece in taken for c in of_piece]
        places = [
            f.offset(f.arguments["state"], 64 + 4 * (r * case.value_head_dim + c))
            for r in range(case.rows)
            for c in channels
        ]

        def token(
            t: Value, sums: list[Value], taken: list[tuple[int, list[int]]] = taken, channels: list[int] = channels
        ) -> list[Value]:
            row = _token_row(f, "value_codes", t, row_bytes)
            numbers = [n for piece, _ in taken for n in _numbers(f, case, block.value, row, row_bytes, piece)]
            result = []
            for r in range(case.rows):
                for k, (channel, values) in enumerate(numbers):
                    group = channel // case.group_size if packed else 0
                    at = f.offset(weights, 4 * (r * groups + group) * size)
                    weight = f.splat(f.load("float", f.offset(at, f.times(t, 4)), 4), 16)
                    result.append(multiply_add(f, values, weight, sums[r * len(channels) + k]))
            return result

        sums = f.loop(count, [f.load(_F16, p, 4) for p in places], token, first=first)
        for place, value in zip(places, sums, strict=True):
            f.store(value, place, 4)


def _token_row(f: Function, name: str, token: Value, row_bytes: int) -> Value:
    """Where a token of the block lies."""
    base = f.arguments[name]
    if "turn" in f.arguments:
        before = f.value("i1", f"icmp slt {token}, {f.arguments['turn'].name}")
        base = f.value("ptr", f"select {before}, {base}, {f.arguments[name + '_behind']}")
    return f.offset(base, f.times(token, row_bytes))


def _numbers(
    f: Function | None, case: AttentionCase, form: str, row: Value, row_bytes: int, piece: int | None = None
) -> list[tuple[int, Value]]:
    """First channel and sixteen float32 numbers (bare codes, or the floats), of a token's row or of one piece of it.

    Without a function to write to, only the channels.
    """
    found: list[tuple[int, Value]] = []
    if not form.isdigit():
        width = 16 * _float_bytes(form)
        for at in range(0, row_bytes, width) if piece is None else [piece]:
            channel = at // _float_bytes(form)
            found.append((channel, row if f is None else _load_floats(f, form, f.offset(row, at), case.target)))
        return found
    bits_per_code = int(form)
    for at in range(0, row_bytes, 16) if piece is None else [piece]:
        codes = f.load("<16 x i8>", f.offset(row, at)) if f is not None else row
        for plane in range(8 // bits_per_code):
            channel = plane * row_bytes + at
            if f is None:
                found.append((channel, row))
                continue
            code = f.binary("lshr", codes, splat_constant(codes.type, plane * bits_per_code)) if plane else codes
            if bits_per_code < 8:
                code = f.binary("and", code, splat_constant(codes.type, (1 << bits_per_code) - 1))
            found.append((channel, f.cast("sitofp", f.cast("zext", code, "<16 x i32>"), _F16)))
    return found


def _load_floats(f: Function, dtype: str, pointer: Value, target: Target) -> Value:
    """Sixteen numbers of `dtype` as float32."""
    size = _float_bytes(dtype)
    return floats_of(f, f.load(_F16 if size == 4 else "<16 x i16>", pointer, size), dtype, target)


def _store_floats(f: Function, dtype: str, value: Value, pointer: Value, target: Target) -> None:
    """Sixteen float32 as numbers of `dtype`, to nearest even."""
    f.store(bits_of(f, value, dtype, target), pointer, _float_bytes(dtype))


def exponential(f: Function, x: Value) -> Value:
    """exp of sixteen float32, zero or above: 2^n times 2^f, f within a half, by a polynomial of degree 6.

    Below -87 the result is 2^-126 or less, as good as none; minus infinity included.
    """
    floor = splat_constant(_F16, "-8.700000e+01")
    below = f.value("<16 x i1>", f"fcmp olt {x}, {floor.name}")
    x = f.value(_F16, f"select {below}, {floor}, {x}")
    scaled = f.binary("fmul", x, splat_constant(_F16, "0x3FF7154760000000"))  # log2(e)
    whole = f.call(_F16, "llvm.rint.v16f32", scaled)
    # x - n ln 2 in two parts, or the error of n ln 2 would be the error of the result
    rest = multiply_add(f, whole, splat_constant(_F16, "0xBFE62E4000000000"), x)
    rest = multiply_add(f, whole, splat_constant(_F16, "0xBEB7F7D1C0000000"), rest)
    value = splat_constant(_F16, _float_constant(1 / 720))
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        value = multiply_add(f, value, rest, splat_constant(_F16, _float_constant(coefficient)))
    exponent = f.cast("fptosi", whole, "<16 x i32>")
    bits = f.binary("shl", exponent, splat_constant(exponent.type, 23))
    return f.cast("bitcast", f.binary("add", f.cast("bitcast", value, "<16 x i32>"), bits), _F16)


def _capped(f: Function, x: Value, softcap: float) -> Value:
    """softcap * tanh(x / softcap), as softcap - 2 softcap / (1 + exp(2 x / softcap))."""
    grown = f.binary("fmul", x, splat_constant(_F16, _float_constant(2 / softcap)))
    limit = splat_constant(_F16, "8.000000e+01")  # exp stays finite, tanh is 1 long before
    above = f.value("<16 x i1>", f"fcmp ogt {grown}, {limit.name}")
    power = exponential(f, f.value(_F16, f"select {above}, {limit}, {grown}"))
    bottom = f.binary("fadd", power, splat_constant(_F16, "1.000000e+00"))
    part = f.value(_F16, f"fdiv {splat_constant(_F16, _float_constant(2 * softcap))}, {bottom.name}")
    capped = f.value(_F16, f"fsub {splat_constant(_F16, _float_constant(softcap))}, {part.name}")
    # a place without a token stays minus infinity
    none = f.value("<16 x i1>", f"fcmp oeq {x}, {splat_constant(_F16, '0xFFF0000000000000').name}")
    return f.value(_F16, f"select {none}, {x}, {capped}")


def multiply_add_scalar(f: Function, a: Value, b: Value, c: Value) -> Value:
    return f.binary("fadd", f.binary("fmul", a, b), c)


def _log(f: Function, x: Value) -> Value:
    """Natural logarithm, once per row: the C library's."""
    return f.call("float", "logf", x)


def _sum(f: Function, lanes: Value) -> Value:
    f.module.declare("declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)")
    return f.value("float", f"call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, {lanes})")


def _larger(f: Function, a: Value, b: Value) -> Value:
    bool_type = "i1" if a.type == "float" else "<16 x i1>"
    more = f.value(bool_type, f"fcmp ogt {a}, {b.name}")
    return f.value(a.type, f"select {more}, {a}, {b}")


def _at_least(f: Function, a: Value, limit: int) -> Value:
    less = f.value("i1", f"icmp slt {a}, {limit}")
    return f.value("i64", f"select {less}, i64 {limit}, {a}")


def _larger_int(f: Function, a: Value, b: Value) -> Value:
    less = f.value("i1", f"icmp slt {a}, {b.name}")
    return f.value("i64", f"select {less}, {b}, {a}")


def _smaller_int(f: Function, a: Value, b: Value) -> Value:
    less = f.value("i1", f"icmp slt {a}, {b.name}")
    return f.value("i64", f"select {less}, {a}, {b}")


def _smaller(f: Function, a: Value, limit: int) -> Value:
    less = f.value("i1", f"icmp slt {a}, {limit}")
    return f.value("i64", f"select {less}, {a}, i64 {limit}")


def _row_bytes(form: str, channels: int) -> int:
    return channels * int(form) // 8 if form.isdigit() else channels * _float_bytes(form)


def _float_bytes(form: str) -> int:
    return 4 if form == "float32" else 2


def _float_constant(value: float) -> str:
    """A float32 constant in LLVM's spelling: the bits of the double that equals it."""
    import struct

    rounded = struct.unpack("<f", struct.pack("<f", value))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"
