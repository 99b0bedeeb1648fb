"""LLVM IR that lays one token's activations out as a kernel's inner loop reads them, once per call.

Three steps over one row of float32 scratch: convert and pad with zeros; with 8-bit activations, round each group to
int8 (scale = largest magnitude / 127) in place; then, chunk by chunk, permute into the order of the scheme's lanes.
Sums of groups, for zero points, and start values, for unsigned codes, fall out on the way. Microseconds per token.
"""

from __future__ import annotations

from haversack.kernels.ir import Function, Module, Value, vector, zeros
from haversack.kernels.ir_float import bf16_of, bf16_to_float
from haversack.kernels.ir_matmul import MatmulCase

_F16 = "<16 x float>"


def add_prepare(module: Module, case: MatmulCase) -> None:
    """`prepare(x, scratch, round, token)`: token `token` of a round; `x` null stands for zeros."""
    f = Function(module, "prepare", [("ptr", "x"), ("ptr", "scratch"), ("ptr", "round"), ("i64", "token")])
    scratch, token = f.arguments["scratch"], f.arguments["token"]
    round_ = f.arguments["round"]
    starts = f.offset(f.offset(round_, case.activation_bytes), f.times(token, 64))
    scales = f.offset(f.offset(round_, case.scales_at), f.times(token, 4 * case.padded_groups))
    sums = f.offset(f.offset(round_, case.sums_at), f.times(token, 4 * case.padded_groups))
    _clear(f, scratch, case.scratch_bytes)
    if case.scale_bytes:
        _clear(f, scales, 4 * case.padded_groups)
    if case.sum_bytes:
        _clear(f, sums, 4 * case.padded_groups)
    f.when(f.value("i1", f"icmp ne {f.arguments['x']}, null"), lambda: _convert(f, case))
    if case.scheme.activation_bits == 8:
        _quantize_groups(f, case, scales, sums)
    elif case.sum_bytes:
        _sum_groups(f, case, sums)
    _permute(f, case, starts)
    f.end()


def _clear(f: Function, pointer: Value, num_bytes: int) -> None:
    def body(i: Value, _: list[Value]) -> list[Value]:
        f.store(zeros(_F16), f.offset(pointer, i))
        return []

    f.loop(num_bytes, [], body, step=64)


def _convert(f: Function, case: MatmulCase) -> None:
    """The token's activations in float32 at the start of the scratch row."""
    x, scratch, count = f.arguments["x"], f.arguments["scratch"], case.fmt.in_features

    def copy(i: Value, lanes: int) -> list[Value]:
        if case.dtype == "float32":
            type_ = "float" if lanes == 1 else _F16
            value = f.load(type_, f.offset(x, f.times(i, 4)))
        else:
            value = bf16_to_float(f, f.load("i16" if lanes == 1 else "<16 x i16>", f.offset(x, f.times(i, 2))))
        f.store(value, f.offset(scratch, f.times(i, 4)), 4)
        return []

    whole = count // 16 * 16
    f.loop(whole, [], lambda i, _: copy(i, 16), step=16)
    f.loop(count, [], lambda i, _: copy(i, 1), first=whole)


def _group_columns(case: MatmulCase) -> int:
    """Columns of a group in the padded scratch row."""
    return case.num_chunks * case.scheme.chunk_columns if case.whole_row else case.fmt.group_size


def _sum(f: Function, lanes: Value) -> Value:
    f.module.declare("declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)")
    return f.value("float", f"call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, {lanes})")


def _sum_groups(f: Function, case: MatmulCase, sums: Value) -> None:
    columns = _group_columns(case)

    def group(g: Value, _: list[Value]) -> list[Value]:
        base = f.offset(f.arguments["scratch"], f.times(g, 4 * columns))

        def add(i: Value, carried: list[Value]) -> list[Value]:
            return [f.binary("fadd", carried[0], f.load(_F16, f.offset(base, i), 64))]

        total = f.loop(4 * columns, [zeros(_F16)], add, step=64)[0]
        f.store(_sum(f, total), f.offset(sums, f.times(g, 4)), 4)
        return []

    f.loop(case.fmt.num_groups, [], group)


def _quantize_groups(f: Function, case: MatmulCase, scales: Value, sums: Value) -> None:
    """Round each group to whole numbers of its scale, in place; write the scales and, for zero points, the sums."""
    columns = _group_columns(case)

    def group(g: Value, _: list[Value]) -> list[Value]:
        base = f.offset(f.arguments["scratch"], f.times(g, 4 * columns))

        def widest(i: Value, carried: list[Value]) -> list[Value]:
            magnitude = f.call(_F16, "llvm.fabs.v16f32", f.load(_F16, f.offset(base, i), 64))
            larger = f.value("<16 x i1>", f"fcmp ogt {magnitude}, {carried[0].name}")
            return [f.value(_F16, f"select {larger}, {magnitude}, {carried[0]}")]

        lanes = f.loop(4 * columns, [zeros(_F16)], widest, step=64)[0]
        f.module.declare("declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)")
        largest = f.value("float", f"call nnan float @llvm.vector.reduce.fmax.v16f32({lanes})")
        scale = f.value("float", f"fdiv {largest}, 1.270000e+02")
        # Below this the reciprocal overflows; such a group adds nothing that a float32 sum would keep.
        tiny = f.value("i1", f"fcmp olt {largest}, 0x3A00000000000000")
        ratio = f.value("float", f"fdiv float 1.270000e+02, {largest.name}")
        inverse = f.splat(f.value("float", f"select {tiny}, float 0.0, {ratio}"), 16)

        def round_(i: Value, carried: list[Value]) -> list[Value]:
            place = f.offset(base, i)
            scaled = f.binary("fmul", f.load(_F16, place, 64), inverse)
            whole = f.call(_F16, "llvm.rint.v16f32", scaled)
            f.store(whole, place, 64)
            return [f.binary("fadd", carried[0], whole)]

        total = f.loop(4 * columns, [zeros(_F16)], round_, step=64)[0]
        f.store(scale, f.offset(scales, f.times(g, 4)), 4)
        if case.sum_bytes:
            f.store(f.binary("fmul", _sum(f, total), scale), f.offset(sums, f.times(g, 4)), 4)
        return []

    f.loop(case.fmt.num_groups, [], group)


def _permute(f: Function, case: MatmulCase, starts: Value) -> None:
    """Chunk by chunk into the order of the scheme's lanes; also the start values of each segment, if it has offsets."""
    scheme = case.scheme
    offsets = scheme.offsets()
    columns = scheme.chunk_columns
    element = {"bfloat": "i16", "float": "float", "i8": "i8"}[scheme.activation_element]
    in_order = [
        f.value("ptr", f"alloca {vector(columns, element)}, align 64") for _ in range(case.terms)
    ]  # the chunk's columns in the activations' own type, one per term
    chunk_bytes = len(scheme.activation_columns) * case.tokens * case.terms * case.vector_bytes

    def chunk(c: Value, carried: list[Value]) -> list[Value]:
        source = f.offset(f.arguments["scratch"], f.times(c, 4 * columns))
        for i in range(0, columns, 16):
            rest = f.load(_F16, f.offset(source, 4 * i), 64)
            for term in range(case.terms):
                if element == "i16":
                    part = bf16_of(f, rest, case.target)
                    if term + 1 < case.terms:
                        rest = f.binary("fsub", rest, bf16_to_float(f, part))
                    f.store(part, f.offset(in_order[term], 2 * i), 32)
                elif element == "i8":
                    part = f.cast("trunc", f.cast("fptosi", rest, "<16 x i32>"), "<16 x i8>")
                    f.store(part, f.offset(in_order[term], i), 16)
                else:
                    f.store(rest, f.offset(in_order[term], 4 * i), 64)
        target = f.offset(f.arguments["round"], f.times(c, chunk_bytes))
        target = f.offset(target, f.times(f.arguments["token"], case.terms * case.vector_bytes))
        for term in range(case.terms):
            ordered = f.load(vector(columns, element), in_order[term], 64)
            for k, wanted in enumerate(scheme.activation_columns):
                lanes = f.shuffle(ordered, None, wanted)
                f.store(lanes, f.offset(target, (k * case.tokens * case.terms + term) * case.vector_bytes), 64)
                if offsets is not None:
                    typed = f.cast("bitcast", lanes, vector(len(wanted), scheme.activation_element))
                    carried = [scheme.dot(f, carried[0], offsets[k], typed)]
        return carried

    if offsets is None:
        f.loop(case.num_chunks, [], chunk)
        return

    def segment(s: Value, _: list[Value]) -> list[Value]:
        count = case.num_chunks if case.whole_row else case.segment_chunks
        first = f.times(s, case.segment_chunks)
        total = f.loop(
            count,
            [zeros(scheme.accumulator)],
            lambda c, carried: chunk(f.binary("add", first, c), carried),
        )[0]
        subtract = "fsub" if scheme.accumulator == _F16 else "sub"
        negative = f.value(total.type, f"{subtract} {total.type} zeroinitializer, {total.name}")
        f.store(negative, f.offset(starts, f.times(s, 64 * case.tokens)), 64)
        return []

    f.loop(1 if case.whole_row else case.num_segments, [], segment)
