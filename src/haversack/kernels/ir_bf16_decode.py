"""LLVM IR that decodes rows of bfloat16 whose exponents are Huffman codes (`codecs/huffman.py`).

    run(job, parallel, threads)

`job` is an array of 64-bit words, in the order of `JOB`. A team of threads takes turns of `TURN_ROWS` rows. A code is
looked up by the next 12 bits; that takes some eight cycles from one to the next, so that four rows are decoded abreast.
Four codes are read from one load of 64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from haversack.codecs.huffman import MAX_BITS
from haversack.kernels.ir import Function, Module, Value
from haversack.kernels.ir_team import add_record_entry, smaller

TURN_ROWS, ABREAST = 16, 4

_CODES_PER_LOAD = 4
"""At 12 bits each, after up to 7 bits of the byte that they begin in: 55 of 64."""

JOB = ("payload", "starts", "rest", "table", "index", "out", "rows", "columns")
"""Words of a job: bytes; int32 `(all rows,)`; uint8 `(all rows, columns)` of signs and mantissas; int16 `(4096,)`; int64
`(rows,)`, which rows; bfloat16 `(rows, columns)`."""

_NUMBERS = ("rows", "columns")


def bf16_decode_text() -> str:
    """The whole module, entry `run`."""
    module = Module()
    add_record_entry(
        module,
        [("i64" if name in _NUMBERS else "ptr", name) for name in JOB],
        lambda f, at: f.binary("udiv", f.binary("add", at["rows"], TURN_ROWS - 1), TURN_ROWS),
        _turn,
    )
    return module.text()


def _turn(f: Function, at: dict[str, Value], number: Value) -> None:
    first = f.times(number, TURN_ROWS)
    last = smaller(f, f.binary("add", first, TURN_ROWS), at["rows"])
    whole = f.binary("sub", last, f.binary("urem", f.binary("sub", last, first), ABREAST))

    def rows_from(r: Value, num_rows: int) -> list[Value]:
        _rows(f, at, [f.binary("add", r, i) for i in range(num_rows)])
        return []

    f.loop(whole, [], lambda r, _: rows_from(r, ABREAST), first=first, step=ABREAST)
    f.loop(last, [], lambda r, _: rows_from(r, 1), first=whole)


def _rows(f: Function, at: dict[str, Value], rows: Sequence[Value]) -> None:
    """Decode rows abreast: every carried value is where a row's next code begins, in bits."""
    chosen = [f.load("i64", f.offset(at["index"], f.times(row, 8)), 8) for row in rows]
    starts = [f.cast("zext", f.load("i32", f.offset(at["starts"], f.times(row, 4)), 4), "i64") for row in chosen]
    rests = [f.offset(at["rest"], f.binary("mul", row, at["columns"])) for row in chosen]
    outs = [f.offset(at["out"], f.times(f.binary("mul", row, at["columns"]), 2)) for row in rows]

    def columns(c: Value, places: list[Value], num_codes: int) -> list[Value]:
        after = []
        for place, rest, out in zip(places, rests, outs, strict=True):
            word = f.load("i64", f.offset(at["payload"], f.binary("lshr", place, 3)))
            word = f.binary("shl", f.call("i64", "llvm.bswap.i64", word), f.binary("and", place, 7))
            for code in range(num_codes):
                column = f.binary("add", c, code)
                entry_at = f.times(f.binary("lshr", word, 64 - MAX_BITS), 2)
                entry = f.cast("zext", f.load("i16", f.offset(at["table"], entry_at), 2), "i64")
                bits = f.binary("lshr", entry, 8)
                word, place = f.binary("shl", word, bits), f.binary("add", place, bits)
                exponent = f.binary("shl", f.binary("and", entry, 255), 7)
                kept = f.cast("zext", f.load("i8", f.offset(rest, column)), "i64")
                sign = f.binary("shl", f.binary("and", kept, 128), 8)
                value = f.binary("or", f.binary("or", sign, exponent), f.binary("and", kept, 127))
                f.store(f.cast("trunc", value, "i16"), f.offset(out, f.times(column, 2)), 2)
            after.append(place)
        return after

    fours = f.binary("and", at["columns"], -_CODES_PER_LOAD)
    begun = [f.times(start, 8) for start in starts]
    places = f.loop(fours, begun, lambda c, p: columns(c, p, _CODES_PER_LOAD), step=_CODES_PER_LOAD)
    f.loop(at["columns"], places, lambda c, p: columns(c, p, 1), first=fours)
