"""LLVM IR of AdamW's update where both moments are codes of 8 or 4 bits under one scale per block: read, step and rounded again in one pass.

    run(job, parallel, threads)

`job` is an array of 64-bit words, in the order of `JOB`. A team of threads takes turns of `TURN_BLOCKS` blocks. With m and v a block's moments under their scales, and
the constants of `NUMBERS`:

    m += (g - m) new_mean        v = v keep_square + g g new_square        w -= step m / (sqrt(v) root + eps)

Then each moment's scale is its block's largest magnitude, and its codes those of `m / scale` in bfloat16, looked up by its bits (`codecs/moment_codes.py`).
"""

from __future__ import annotations

from haversack.kernels.ir import Function, Module, Value, constant, splat_constant, vector
from haversack.kernels.ir_team import add_record_entry, smaller

LANES, TURN_BLOCKS = 16, 64

JOB = (
    "weight",
    "grad",
    "mean",
    "mean_scale",
    "square",
    "square_scale",
    "decode_mean",
    "encode_mean",
    "decode_square",
    "encode_square",
    "numbers",
    "blocks",
)
"""Words of a job. `weight` and `grad` are float32 `(blocks, block_size)`, `mean` and `square` uint8 `(blocks, block_size bits / 8)`; the scales are float32 `(blocks,)`. Tables have 256 floats, at 4 bits 256 pairs, and 2^16
bytes; `numbers` are float32 in the order of `NUMBERS`."""

NUMBERS = ("new_mean", "keep_square", "new_square", "root", "eps", "step")

_FLOATS, _INTS = vector(LANES, "float"), vector(LANES, "i32")


def adamw_codes_text(block_size: int, bits: int) -> str:
    """The whole module, entry `run`, for blocks of whole vectors."""
    module = Module()
    add_record_entry(
        module,
        [("i64" if name == "blocks" else "ptr", name) for name in JOB],
        lambda f, at: f.binary("udiv", f.binary("add", at["blocks"], TURN_BLOCKS - 1), TURN_BLOCKS),
        lambda f, at, number: _turn(f, block_size, bits, at, number),
    )
    return module.text()


def _turn(f: Function, block_size: int, bits: int, at: dict[str, Value], number: Value) -> None:
    first = f.times(number, TURN_BLOCKS)
    last = smaller(f, f.binary("add", first, TURN_BLOCKS), at["blocks"])
    numbers = {
        name: f.splat(f.load("float", f.offset(at["numbers"], 4 * i), 4), LANES) for i, name in enumerate(NUMBERS)
    }

    def block(b: Value, _: list[Value]) -> list[Value]:
        codes, floats = f.times(b, block_size * bits // 8), f.times(b, 4 * block_size)
        weight, grad = (f.offset(at[name], floats) for name in ("weight", "grad"))
        kept = {name: f.offset(at[name], codes) for name in ("mean", "square")}
        scales = {name: f.offset(at[f"{name}_scale"], f.times(b, 4)) for name in kept}
        old = {name: f.splat(f.load("float", scale, 4), LANES) for name, scale in scales.items()}
        new: dict[str, list[Value]] = {name: [] for name in kept}
        for start in range(0, block_size, LANES):
            place = [f.offset(pointer, 4 * start) for pointer in (weight, grad)]
            moments = [
                f.binary(
                    "fmul", _decoded(f, bits, at[f"decode_{name}"], f.offset(kept[name], start * bits // 8)), old[name]
                )
                for name in kept
            ]
            mean, square = _step(f, place[0], f.load(_FLOATS, place[1], 4), moments, numbers)
            new["mean"].append(mean)
            new["square"].append(square)
        for name, values in new.items():
            _encode(f, bits, at[f"encode_{name}"], values, kept[name], scales[name])
        return []

    f.loop(last, [], block, first=first)


def _decoded(f: Function, bits: int, table: Value, codes: Value) -> Value:
    """The next values; of two codes in a byte the low half comes first, and stands first in the table's row of its own number."""
    read = f.load(vector(LANES * bits // 8, "i8"), codes)
    if bits == 4:
        spread = f.shuffle(read, None, [i // 2 for i in range(LANES)])
        shifted = f.binary("lshr", spread, constant("i8", [4 * (i % 2) for i in range(LANES)]))
        read = f.binary(
            "shl", f.binary("and", shifted, splat_constant(spread.type, 15)), splat_constant(spread.type, 1)
        )
    return _gather(f, "float", table, f.cast("zext", read, vector(LANES, "i64")))


def _gather(f: Function, element: str, table: Value, index: Value) -> Value:
    """Elements of a table by their numbers."""
    pointers = f.value(vector(LANES, "ptr"), f"getelementptr {element}, {table}, {index}")
    result, short = vector(LANES, element), "f32" if element == "float" else element
    name = f"llvm.masked.gather.v{LANES}{short}.v{LANES}p0"
    f.module.declare(f"declare {result} @{name}({pointers.type}, i32, {vector(LANES, 'i1')}, {result})")
    every = splat_constant(vector(LANES, "i1"), "true")
    align = 4 if element == "float" else 1
    return f.value(result, f"call {result} @{name}({pointers}, i32 {align}, {every}, {result} poison)")


def _step(
    f: Function, weight: Value, grad: Value, moments: list[Value], numbers: dict[str, Value]
) -> tuple[Value, Value]:
    """The new moments; the weight is changed where it lies."""
    mean, square = moments
    mean = f.binary("fadd", mean, f.binary("fmul", f.binary("fsub", grad, mean), numbers["new_mean"]))
    added = f.binary("fmul", f.binary("fmul", grad, grad), numbers["new_square"])
    square = f.binary("fadd", f.binary("fmul", square, numbers["keep_square"]), added)
    root = f.binary("fmul", f.call(_FLOATS, f"llvm.sqrt.v{LANES}f32", square), numbers["root"])
    step = f.binary("fdiv", f.binary("fmul", mean, numbers["step"]), f.binary("fadd", root, numbers["eps"]))
    f.store(f.binary("fsub", f.load(_FLOATS, weight, 4), step), weight, 4)
    return mean, square


def _encode(f: Function, bits: int, table: Value, values: list[Value], codes: Value, scale: Value) -> None:
    """A block's largest magnitude, and the codes of all its numbers over that."""
    largest = None
    for value in values:
        magnitude = f.call(_FLOATS, f"llvm.fabs.v{LANES}f32", value)
        largest = magnitude if largest is None else f.call(_FLOATS, f"llvm.maxnum.v{LANES}f32", largest, magnitude)
    assert largest is not None
    most = f.call("float", f"llvm.vector.reduce.fmax.v{LANES}f32", largest)
    f.store(most, scale, 4)
    tiny = Value("float", "0x3810000000000000")  # the smallest normal float32
    divisor = f.splat(f.call("float", "llvm.maxnum.f32", most, tiny), LANES)
    for i, value in enumerate(values):
        words = f.cast("bitcast", f.binary("fdiv", value, divisor), _INTS)
        odd = f.binary("and", f.binary("lshr", words, splat_constant(_INTS, 16)), splat_constant(_INTS, 1))
        rounded = f.binary(
            "add", f.binary("add", words, splat_constant(_INTS, 0x7FFF)), odd
        )  # to the nearest, ties to even
        place = f.binary("xor", f.binary("lshr", rounded, splat_constant(_INTS, 16)), splat_constant(_INTS, 0x8000))
        found = _gather(f, "i8", table, f.cast("zext", place, vector(LANES, "i64")))
        if bits == 4:
            low, high = (f.shuffle(found, None, range(half, LANES, 2)) for half in (0, 1))
            found = f.binary("or", low, f.binary("shl", high, splat_constant(high.type, 4)))
        f.store(found, f.offset(codes, i * LANES * bits // 8))
