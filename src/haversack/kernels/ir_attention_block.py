"""LLVM IR of attention to one block of tokens: scores, a step of streaming softmax, and the values under it.

Keys' scales are folded into the queries once per block (per-channel keys share them over it), so that a score is a dot product with
bare codes; values' scales are folded into the probabilities, so that the output sums bare codes.
"""

from __future__ import annotations

from haversack.kernels import ir_packed_tokens
from haversack.kernels.dot_schemes import multiply_add
from haversack.kernels.ir import Function, Module, Value, splat_constant, vector, zeros
from haversack.kernels.ir_attention_case import TENSORS, AttentionCase, TokenBlock, row_bytes_of
from haversack.kernels.ir_float import float_bytes, half_to_float, sum_of_lanes
from haversack.kernels.ir_math import at_least, capped, exponential, larger, load_floats, multiply_add_scalar

_F16 = "<16 x float>"


def add_block(module: Module, case: AttentionCase, block: TokenBlock, name: str) -> None:
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
    return [sum_of_lanes(f, s) for s in sums]


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
    f: Function, case: AttentionCase, block: TokenBlock, folded: Value, scores: Value, first: Value, count: Value
) -> None:
    """Dot products of every row with the block's keys `first ... count - 1`; minus infinity at the others."""
    for i in range(0, case.rows * block.tokens, 16):
        f.store(splat_constant(_F16, "0xFFF0000000000000"), f.offset(scores, 4 * i), 64)
    row_bytes = row_bytes_of(block.key, case.key_head_dim)
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
    whole = f.binary("and", at_least(f, f.binary("sub", count, first), 0), -16)
    f.loop(count, [], token, first=f.binary("add", first, whole))


def _softmax_row(
    f: Function, case: AttentionCase, block: TokenBlock, row: Value, constant: Value, top: Value, total: Value
) -> tuple[Value, Value, Value]:
    """Scores to unnormalised probabilities in place; the new maximum and sum, and what the old ones shrink by."""
    shift = f.splat(constant, 16)
    parts = []
    for i in range(0, block.tokens, 16):
        score = f.binary("fadd", f.load(_F16, f.offset(row, 4 * i), 64), shift)
        parts.append(capped(f, score, case.softcap) if case.softcap else score)
    highest = parts[0]
    for part in parts[1:]:
        highest = larger(f, highest, part)
    f.module.declare("declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)")
    block_top = f.value("float", f"call float @llvm.vector.reduce.fmax.v16f32({highest})")
    new_top = larger(f, block_top, top)
    spread = f.splat(new_top, 16)
    sums = zeros(_F16)
    for i, part in enumerate(parts):
        probability = exponential(f, f.binary("fsub", part, spread))
        f.store(probability, f.offset(row, 64 * i), 64)
        sums = f.binary("fadd", sums, probability)
    shrink_lanes = exponential(f, f.splat(f.binary("fsub", top, new_top), 16))
    shrink = f.value("float", f"extractelement {shrink_lanes}, i32 0")
    return new_top, multiply_add_scalar(f, total, shrink, sum_of_lanes(f, sums)), shrink


def _fold_values(
    f: Function, case: AttentionCase, block: TokenBlock, row: Value, weights: Value, r: int, shrink: Value
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
    totals = [f.splat(sum_of_lanes(f, lanes), 16) if packed else zeros(_F16) for lanes in added]
    for c in range(0, case.value_head_dim, 16):
        place = f.offset(v["state"], 64 + 4 * (r * case.value_head_dim + c))
        group = c // case.group_size if packed else 0
        f.store(multiply_add(f, f.load(_F16, place, 4), spread, totals[group]), place, 4)


def _add_values(
    f: Function,
    case: AttentionCase,
    block: TokenBlock,
    weights: Value,
    first: Value,
    count: Value,
) -> None:
    """Output rows plus weights times the block's values, as much of every token's row at a time as registers hold."""
    size, groups, packed = block.tokens, block.value_groups, block.value.isdigit()
    row_bytes = row_bytes_of(block.value, case.value_head_dim)
    base = f.arguments["value_codes"]
    step = 16 if packed else 16 * float_bytes(block.value)
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
        width = 16 * float_bytes(form)
        for at in range(0, row_bytes, width) if piece is None else [piece]:
            channel = at // float_bytes(form)
            found.append((channel, row if f is None else load_floats(f, form, f.offset(row, at), case.target)))
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
