"""LLVM IR of decode-time attention over one stored form of keys and values: for any CPU, by plain vectors.

    attend(query, tensors, strides, out, lse, num_items, num_tokens, parallel, threads)

An *item* is one sequence's KV head, with the `rows` query rows that share it (heads of its group times queries); threads
take turns of items. Per block of tokens: keys' scales are folded into the queries once (per-channel keys share them over
the block), so that a score is a dot product with bare codes; values' scales are folded into the probabilities, so that
the output sums bare codes. Between blocks a running maximum, sum and output (streaming softmax, Milakov and Gimelshein
2018, arXiv 1805.02867). Everything is float32; exp is a polynomial of degree 6, 2^-22 of its value.
"""

from __future__ import annotations

from dataclasses import dataclass

from haversack.kernels.dot_schemes import multiply_add
from haversack.kernels.ir import Function, Module, Value, splat_constant, vector, zeros
from haversack.kernels.ir_float import bf16_to_float, half_to_float
from haversack.kernels.llvm import Target

_F16 = "<16 x float>"
PLAIN_BLOCK_TOKENS = 64
"""Tokens between two rescalings where keys and values lie in floats."""

TENSORS = ("key_codes", "key_scales", "key_zeros", "value_codes", "value_scales", "value_zeros")
"""Order of the pointers, and of the strides between items in bytes, that `attend` takes."""

ATTEND_ARGUMENTS = [
    ("ptr", "query"),
    ("ptr", "tensors"),
    ("ptr", "strides"),
    ("ptr", "out"),
    ("ptr", "lse"),
    ("i64", "num_items"),
    ("i64", "num_tokens"),
    ("ptr", "parallel"),
    ("i32", "threads"),
]
_JOB = ["query", "tensors", "strides", "out", "lse", "num_items", "num_tokens", "next"]


@dataclass(frozen=True)
class AttentionCase:
    """One kernel. `key` and `value` are "2", "4" or "8" (bits) or "float32", "bfloat16", "float16".

    Packed keys and values are in layout `kv-tokens-v1`, a token's row in planes, with float16 scales and zeros: per
    channel and `group_size` tokens for keys, per token and `group_size` channels for values.
    """

    rows: int
    key_head_dim: int
    value_head_dim: int
    key: str
    value: str
    group_size: int
    softcap: float | None
    target: Target

    @property
    def block_tokens(self) -> int:
        return self.group_size if self.key.isdigit() else PLAIN_BLOCK_TOKENS

    @property
    def value_groups(self) -> int:
        """Groups of channels with a scale of their own; one, without a scale, for floats."""
        return -(-self.value_head_dim // self.group_size) if self.value.isdigit() else 1


def supports(key_head_dim: int, value_head_dim: int, key: str, value: str) -> bool:
    """Rows of whole vectors of sixteen, in every plane."""

    def whole(channels: int, form: str) -> bool:
        return channels % (16 * 8 // int(form) if form.isdigit() else 16) == 0

    return key.isdigit() == value.isdigit() and whole(key_head_dim, key) and whole(value_head_dim, value)


def attention_text(case: AttentionCase) -> str:
    """The whole module, entry `attend`."""
    module = Module()
    _add_item(module, case)
    _add_work(module, case)
    f = Function(module, "attend", ATTEND_ARGUMENTS)
    job = f.value("ptr", f"alloca [{len(_JOB)} x i64], align 64")
    for i, field in enumerate(_JOB):
        f.store(f.arguments.get(field, Value("i64", "0")), f.offset(job, 8 * i), 8)
    parallel, threads = f.arguments["parallel"], f.arguments["threads"]
    given = f.value("i1", f"icmp ne {parallel}, null")
    together = f.binary("and", given, f.value("i1", f"icmp sgt {threads}, 1"))
    f.when(together, lambda: f.do(f"call void {parallel.name}(ptr @work, {job}, {threads}, i32 0)"))
    f.do(f"call void @work({job})")
    f.end()
    return module.text()


def _add_work(module: Module, case: AttentionCase) -> None:
    """`work(job)`: one thread's items, until there are none left."""
    f = Function(module, "work", [("ptr", "job")])
    job = f.arguments["job"]
    counts = {"num_items", "num_tokens"}
    fields = {n: f.load("i64" if n in counts else "ptr", f.offset(job, 8 * i), 8) for i, n in enumerate(_JOB[:-1])}
    counter = f.offset(job, 8 * _JOB.index("next"))

    def take() -> Value:
        return f.value("i64", f"atomicrmw add {counter}, i64 1 monotonic")

    def item(state: list[Value]) -> list[Value]:
        number = state[0]
        given = []
        for i in range(len(TENSORS)):
            base = f.load("ptr", f.offset(fields["tensors"], 8 * i), 8)
            stride = f.load("i64", f.offset(fields["strides"], 8 * i), 8)
            given.append(f.offset(base, f.binary("mul", number, stride)))
        query = f.offset(fields["query"], f.times(number, 4 * case.rows * case.key_head_dim))
        out = f.offset(fields["out"], f.times(number, 4 * case.rows * case.value_head_dim))
        lse = f.offset(fields["lse"], f.times(number, 4 * case.rows))
        f.do(f"call void @item({query}, {', '.join(map(str, given))}, {out}, {lse}, {fields['num_tokens']})")
        return [take()]

    f.while_less(take(), fields["num_items"], item)
    f.end()


def _add_item(module: Module, case: AttentionCase) -> None:
    """`item(query, <tensors>, out, lse, num_tokens)`: one KV head of one sequence."""
    arguments = [
        ("ptr", "query"),
        *(("ptr", n) for n in TENSORS),
        ("ptr", "out"),
        ("ptr", "lse"),
        ("i64", "num_tokens"),
    ]
    f = Function(module, "item", arguments)
    a, rows, size = f.arguments, range(case.rows), case.block_tokens
    folded = f.value("ptr", f"alloca [{case.rows * case.key_head_dim} x float], align 64")  # queries times key scales
    scores = f.value("ptr", f"alloca [{case.rows * size} x float], align 64")
    weights = f.value("ptr", f"alloca [{case.rows * case.value_groups * size} x float], align 64")

    def clear(i: Value, _: list[Value]) -> list[Value]:
        f.store(zeros(_F16), f.offset(a["out"], i))
        return []

    f.loop(4 * case.rows * case.value_head_dim, [], clear, step=64)
    lowest = Value("float", "0xC7EFFFFFE0000000")  # the most negative finite number: shrinking from it gives zero
    start = [lowest] * case.rows + [Value("float", "0.0")] * case.rows

    def block(first: Value, carried: list[Value]) -> list[Value]:
        """Tokens `first ... first + size - 1`; `carried` is the maxima, then the sums, of the rows."""
        left = f.binary("sub", a["num_tokens"], first)
        count = _smaller(f, left, size)
        constants = _fold_keys(f, case, folded, first)
        _write_scores(f, case, folded, scores, first, count)
        maxima, sums = [], []
        group_weights: list[list[Value]] = []
        for r in rows:
            row = f.offset(scores, 4 * size * r)
            top, total, shrink = _softmax_row(f, case, row, constants[r], carried[r], carried[case.rows + r])
            maxima.append(top)
            sums.append(total)
            group_weights.append(_fold_values(f, case, row, weights, r, first, shrink))
        _add_values(f, case, weights, group_weights, first, count)
        return [*maxima, *sums]

    carried = f.loop(a["num_tokens"], start, block, step=size)
    for r in rows:
        top, total = carried[r], carried[case.rows + r]
        inverse = f.splat(f.value("float", f"fdiv float 1.0, {total.name}"), 16)
        for c in range(0, case.value_head_dim, 16):
            place = f.offset(a["out"], 4 * (r * case.value_head_dim + c))
            f.store(f.binary("fmul", f.load(_F16, place), inverse), place)
        f.store(f.binary("fadd", top, _log(f, total)), f.offset(a["lse"], 4 * r), 4)
    f.end()


def _fold_keys(f: Function, case: AttentionCase, folded: Value, first: Value) -> list[Value]:
    """Queries times the block's key scales into `folded`; per row the sum of queries times key zeros."""
    nothing = Value("float", "0.0")
    query = f.arguments["query"]
    if not case.key.isdigit():

        def copy(i: Value, _: list[Value]) -> list[Value]:
            f.store(f.load(_F16, f.offset(query, i)), f.offset(folded, i), 64)
            return []

        f.loop(4 * case.rows * case.key_head_dim, [], copy, step=64)
        return [nothing] * case.rows
    group = f.binary("udiv", first, case.group_size)
    at = f.times(group, 2 * case.key_head_dim)

    def fold(i: Value, carried: list[Value]) -> list[Value]:
        """Channels i ... i + 15."""
        half = f.binary("add", at, f.times(i, 2))
        scale = half_to_float(f, f.load("<16 x i16>", f.offset(f.arguments["key_scales"], half), 2), case.target)
        zero = half_to_float(f, f.load("<16 x i16>", f.offset(f.arguments["key_zeros"], half), 2), case.target)
        result = []
        for r in range(case.rows):
            where = f.binary("add", f.times(i, 4), 4 * r * case.key_head_dim)
            q = f.load(_F16, f.offset(query, where))
            f.store(f.binary("fmul", q, scale), f.offset(folded, where), 64)
            result.append(multiply_add(f, q, zero, carried[r]))
        return result

    sums = f.loop(case.key_head_dim, [zeros(_F16)] * case.rows, fold, step=16)
    return [_sum(f, s) for s in sums]


def _write_scores(f: Function, case: AttentionCase, folded: Value, scores: Value, first: Value, count: Value) -> None:
    """Dot products of every row with the block's keys; minus infinity where the block has no token."""
    size = case.block_tokens
    for i in range(0, case.rows * size, 16):
        f.store(splat_constant(_F16, "0xFFF0000000000000"), f.offset(scores, 4 * i), 64)
    row_bytes = _row_bytes(case.key, case.key_head_dim)
    base = f.offset(f.arguments["key_codes"], f.times(first, row_bytes))

    def token(t: Value, _: list[Value]) -> list[Value]:
        sums = [zeros(_F16)] * case.rows
        for channel, numbers in _numbers(f, case, case.key, f.offset(base, f.times(t, row_bytes)), row_bytes):
            for r in range(case.rows):
                q = f.load(_F16, f.offset(folded, 4 * (r * case.key_head_dim + channel)), 64)
                sums[r] = multiply_add(f, numbers, q, sums[r])
        for r in range(case.rows):
            f.store(_sum(f, sums[r]), f.offset(f.offset(scores, 4 * size * r), f.times(t, 4)), 4)
        return []

    f.loop(count, [], token)


def _softmax_row(
    f: Function, case: AttentionCase, row: Value, constant: Value, top: Value, total: Value
) -> tuple[Value, Value, Value]:
    """Scores to unnormalised probabilities in place; the new maximum and sum, and what the old ones shrink by."""
    shift = f.splat(constant, 16)
    parts = []
    for i in range(0, case.block_tokens, 16):
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
    f: Function, case: AttentionCase, row: Value, weights: Value, r: int, first: Value, shrink: Value
) -> list[Value]:
    """Probabilities times value scales into `weights`; shrink the output so far; per group of channels what its zeros add.

    The zeros' part is the sum over tokens of probability times zero: one number for all channels of the group.
    """
    size, groups, v = case.block_tokens, case.value_groups, f.arguments
    added = [zeros(_F16)] * groups
    for i in range(0, size, 16):
        probability = f.load(_F16, f.offset(row, 4 * i), 64)
        if not case.value.isdigit():
            f.store(probability, f.offset(weights, 4 * (r * size + i)), 64)
            continue
        at = f.times(f.binary("add", first, i), 2 * groups)
        loaded = [f.load(vector(16 * groups, "i16"), f.offset(v[n], at), 2) for n in ("value_scales", "value_zeros")]
        for g in range(groups):
            mask = [lane * groups + g for lane in range(16)]
            scale, zero = (half_to_float(f, f.shuffle(both, None, mask), case.target) for both in loaded)
            place = f.offset(weights, 4 * ((r * groups + g) * size + i))
            f.store(f.binary("fmul", probability, scale), place, 64)
            added[g] = multiply_add(f, probability, zero, added[g])
    spread = f.splat(shrink, 16)
    totals = [f.splat(_sum(f, lanes), 16) if case.value.isdigit() else zeros(_F16) for lanes in added]
    for c in range(0, case.value_head_dim, 16):
        place = f.offset(v["out"], 4 * (r * case.value_head_dim + c))
        group = c // case.group_size if case.value.isdigit() else 0
        f.store(multiply_add(f, f.load(_F16, place), spread, totals[group]), place)
    return totals


def _add_values(
    f: Function, case: AttentionCase, weights: Value, totals: list[list[Value]], first: Value, count: Value
) -> None:
    """Output rows plus weights times the block's values, sixteen bytes of every token's row at a time."""
    size, groups = case.block_tokens, case.value_groups
    row_bytes = _row_bytes(case.value, case.value_head_dim)
    base = f.offset(f.arguments["value_codes"], f.times(first, row_bytes))
    step = 16 if case.value.isdigit() else 16 * _float_bytes(case.value)
    for piece in range(0, row_bytes, step):
        channels = [c for c, _ in _numbers(None, case, case.value, base, row_bytes, piece)]
        places = [
            f.offset(f.arguments["out"], 4 * (r * case.value_head_dim + c)) for r in range(case.rows) for c in channels
        ]

        def token(t: Value, sums: list[Value], piece: int = piece, channels: list[int] = channels) -> list[Value]:
            numbers = _numbers(f, case, case.value, f.offset(base, f.times(t, row_bytes)), row_bytes, piece)
            result = []
            for r in range(case.rows):
                for k, (channel, values) in enumerate(numbers):
                    group = channel // case.group_size if case.value.isdigit() else 0
                    at = f.offset(weights, 4 * (r * groups + group) * size)
                    weight = f.splat(f.load("float", f.offset(at, f.times(t, 4)), 4), 16)
                    result.append(multiply_add(f, values, weight, sums[r * len(channels) + k]))
            return result

        sums = f.loop(count, [f.load(_F16, p) for p in places], token)
        for place, value in zip(places, sums, strict=True):
            f.store(value, place)


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
            if f is None:
                found.append((channel, row))
            elif form == "float32":
                found.append((channel, f.load(_F16, f.offset(row, at), 4)))
            else:
                bits = f.load("<16 x i16>", f.offset(row, at), 2)
                floats = bf16_to_float(f, bits) if form == "bfloat16" else half_to_float(f, bits, case.target)
                found.append((channel, floats))
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
