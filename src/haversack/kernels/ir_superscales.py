"""LLVM IR that writes second-level scales out as float16, one per group.

    run(job, parallel, threads)

`job` is an array of 64-bit words, in the order of `JOB`. A team of threads takes turns of `TURN_ROWS` rows. A row's
superblocks follow one another in layout `scales-v1` (`codecs/scale_codings.py`): low nibbles in two halves, for 6 bits
then the high bits in four quarters. The float16 of group g is `(code - offset) * superscale`, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

from haversack.kernels.ir import Function, Module, Value, constant, splat_constant, vector
from haversack.kernels.ir_float import half_to_float
from haversack.kernels.ir_team import add_record_entry, smaller
from haversack.kernels.llvm import Target

TURN_ROWS = 64

LANES = 32
"""Codes of whole superblocks that are taken apart together; none has more."""

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

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's scales once they are written out."""
        return 2 * self.groups


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
    at_once = LANES // case.padded

    def row(r: Value, _: list[Value]) -> list[Value]:
        codes = f.offset(at["codes"], f.times(r, case.blocks * case.block_bytes))
        superscales = f.offset(at["superscales"], f.times(r, 2 * case.blocks))
        out = f.offset(at["out"], f.times(r, 2 * case.groups))

        def blocks(b: Value, _: list[Value]) -> list[Value]:
            _blocks(f, case, target, codes, superscales, out, b, at_once * case.per_block)
            return []

        whole = case.groups // (at_once * case.per_block) * at_once
        f.loop(whole, [], blocks, step=at_once)
        rest = case.groups - whole * case.per_block
        if rest:
            _blocks(f, case, target, codes, superscales, out, Value("i64", str(whole)), rest)
        return []

    f.loop(last, [], row, first=first)


def _blocks(
    f: Function,
    case: SuperscaleCase,
    target: Target,
    codes: Value,
    superscales: Value,
    out: Value,
    number: Value,
    num_groups: int,
) -> None:
    """The first `num_groups` scales of as many superblocks as they take, from superblock `number` on."""
    count = -(-num_groups // case.per_block)
    places = [divmod(group, case.per_block) for group in range(num_groups)]
    half, quarter = case.padded // 2, case.padded // 4
    words = vector(num_groups, "i32")

    def field(bytes_: Value, first: int, size: int, bits: int) -> Value:
        """`bits` of each code, of which byte j of `size` from `first` on holds those of codes j, j + size, ... from its low bits up."""
        spread = f.shuffle(bytes_, None, [b * case.block_bytes + first + i % size for b, i in places])
        shifts = constant("i32", [bits * (i // size) for _, i in places])
        return f.binary(
            "and", f.binary("lshr", f.cast("zext", spread, words), shifts), splat_constant(words, 2**bits - 1)
        )

    packed = f.load(vector(count * case.block_bytes, "i8"), f.offset(codes, f.times(number, case.block_bytes)))
    code = field(packed, 0, half, 4)
    if case.bits == 6:
        high = field(packed, half, quarter, 2)
        code = f.binary("or", code, f.binary("shl", high, splat_constant(words, 4)))
    floats = vector(num_groups, "float")
    value = f.cast("uitofp", code, floats)
    if case.signed:
        value = f.binary("fadd", value, splat_constant(floats, f"-{1 << (case.bits - 1)}.0"))
    stored = f.load(vector(count, "i16"), f.offset(superscales, f.times(number, 2)), 2)
    superscale = f.shuffle(half_to_float(f, stored, target), None, [b for b, _ in places])
    halves = f.cast("fptrunc", f.binary("fmul", value, superscale), vector(num_groups, "half"))
    f.store(f.cast("bitcast", halves, vector(num_groups, "i16")), f.offset(out, f.times(number, 2 * case.per_block)), 2)
