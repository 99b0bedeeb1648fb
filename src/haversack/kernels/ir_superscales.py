"""LLVM IR that writes second-level scales out as float16, one per group.

    run(job, parallel, threads)

`job` is an array of 64-bit words, in the order of `JOB`. A team of threads takes turns of `TURN_ROWS` rows. A row's
superblocks follow one another in layout `scales-v1` (`codecs/scale_codings.py`): low nibbles in two halves, for 6 bits
then the high bits in four quarters. The float16 of group g is `(code - offset) * superscale`, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

from haversack.kernels.ir import Function, Module, Value, splat_constant, vector
from haversack.kernels.ir_float import half_to_float
from haversack.kernels.ir_team import add_record_entry, smaller
from haversack.kernels.llvm import Target

TURN_ROWS = 64

JOB = ("codes", "superscales", "out", "rows")
"""Words of a job: packed codes `(rows, block_bytes * blocks)`, float16 `(rows, blocks)` and `(rows, groups)`."""


@dataclass(frozen=True)
class SuperscaleCase:
    """`groups` per row of `bits` (4 or 6), `per_block` of them under one superscale and padded to a multiple of 4."""

    bits: int
    per_block: int
    signed: bool
    groups: int

    @property
    def padded(self) -> int:
        return -(-self.per_block // 4) * 4

    @property
    def block_bytes(self) -> int:
        return self.padded * self.bits // 8

    @property
    def blocks(self) -> int:
        return -(-self.groups // self.per_block)


def supports(target: Target) -> bool:
    """CPUs that round vectors of float32 to float16 themselves."""
    return target.has("f16c") or target.has("avx512f") or target.has("neon")


def superscale_text(case: SuperscaleCase, target: Target) -> str:
    """The whole module, entry `run`."""
    module = Module()
    add_record_entry(
        module,
        [("i64" if name == "rows" else "ptr", name) for name in JOB],
        lambda f, at: f.binary("udiv", f.binary("add", at["rows"], TURN_ROWS - 1), TURN_ROWS),
        lambda f, at, number: _turn(f, case, target, at, number),
    )
    return module.text()


def _turn(f: Function, case: SuperscaleCase, target: Target, at: dict[str, Value], number: Value) -> None:
    first = f.times(number, TURN_ROWS)
    last = smaller(f, f.binary("add", first, TURN_ROWS), at["rows"])

    def row(r: Value, _: list[Value]) -> list[Value]:
        codes = f.offset(at["codes"], f.times(r, case.blocks * case.block_bytes))
        superscales = f.offset(at["superscales"], f.times(r, 2 * case.blocks))
        out = f.offset(at["out"], f.times(r, 2 * case.groups))

        def block(b: Value, _: list[Value]) -> list[Value]:
            _block(f, case, target, codes, superscales, out, b, case.per_block)
            return []

        whole = case.groups // case.per_block
        f.loop(Value("i64", str(whole)), [], block)
        if case.groups % case.per_block:
            _block(f, case, target, codes, superscales, out, Value("i64", str(whole)), case.groups % case.per_block)
        return []

    f.loop(last, [], row, first=first)


def _block(
    f: Function,
    case: SuperscaleCase,
    target: Target,
    codes: Value,
    superscales: Value,
    out: Value,
    number: Value,
    num_groups: int,
) -> None:
    """The first `num_groups` scales of one superblock."""
    lanes, half, quarter = case.padded, case.padded // 2, case.padded // 4
    start = f.offset(codes, f.binary("mul", number, case.block_bytes))
    low = f.load(vector(half, "i8"), start)
    low_half = f.binary("and", low, splat_constant(low.type, 15))
    high_half = f.binary("lshr", low, splat_constant(low.type, 4))
    code = f.shuffle(low_half, high_half, range(lanes))
    if case.bits == 6:
        high = f.load(vector(quarter, "i8"), f.offset(start, half))
        spread = f.shuffle(high, None, [i % quarter for i in range(lanes)])
        shifts = Value(spread.type, "<" + ", ".join(f"i8 {2 * (i // quarter)}" for i in range(lanes)) + ">")
        bits = f.binary("and", f.binary("lshr", spread, shifts), splat_constant(spread.type, 3))
        code = f.binary("or", code, f.binary("shl", bits, splat_constant(bits.type, 4)))
    floats = vector(lanes, "float")
    value = f.cast("uitofp", f.cast("zext", code, vector(lanes, "i32")), floats)
    if case.signed:
        value = f.binary("fadd", value, splat_constant(floats, f"-{1 << (case.bits - 1)}.0"))
    stored = f.load("i16", f.offset(superscales, f.times(number, 2)), 2)
    superscale = half_to_float(f, f.splat(stored, lanes), target)
    halves = f.cast("fptrunc", f.binary("fmul", value, superscale), vector(lanes, "half"))
    words = f.cast("bitcast", halves, vector(lanes, "i16"))
    if num_groups < lanes:
        words = f.shuffle(words, None, range(num_groups))
    f.store(words, f.offset(out, f.binary("mul", number, 2 * case.per_block)), 2)
