"""LLVM IR that runs a list of prepared calls: a step of decoding is one call from Python.

    run(tape, count)      `count` pairs of addresses: a function and the record it gets

A record is an array of 64-bit words. `thunk_*` are functions of one record that call a kernel's entry: the first word is its
address, the others are its arguments in order.

    append(record)        the new token of every sequence into one layer's sinks or ring (words: `APPEND_RECORD`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from haversack.kernels.ir import Function, Module, Value

APPEND_RECORD = (
    "num_rows", "num_kv_heads", "num_slab_heads", "counts", "sink_tokens", "ring_tokens", "slots",
    "new_keys", "new_key_stride", "new_key_head_stride", "keys", "key_bytes",
    "new_values", "new_value_stride", "new_value_head_stride", "values", "value_bytes",
)  # fmt: skip
"""Strides are bytes; `key_bytes` are those of one head's key. Of a slab's `num_slab_heads` heads `num_kv_heads` are written, `keys` and
`values` being where the first of them begins."""

_POINTERS = {"counts", "new_keys", "keys", "new_values", "values"}


def tape_text(thunks: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """The whole module; `thunks` names entries' arguments as `(type, name)`, each a pointer, i64 or i32."""
    module = Module()
    f = Function(module, "run", [("ptr", "tape"), ("i64", "count")])

    def call(i: Value, _: list[Value]) -> list[Value]:
        at = f.offset(f.arguments["tape"], f.times(i, 16))
        function, record = f.load("ptr", at, 8), f.load("ptr", f.offset(at, 8), 8)
        f.do(f"call void {function.name}({record})")
        return []

    f.loop(f.arguments["count"], [], call)
    f.end()
    for name, arguments in thunks.items():
        f = Function(module, f"thunk_{name}", [("ptr", "record")])
        record = f.arguments["record"]
        given = []
        for i, (type_, _) in enumerate(arguments):
            word = f.load("ptr" if type_ == "ptr" else "i64", f.offset(record, 8 * (i + 1)), 8)
            given.append(f.cast("trunc", word, "i32") if type_ == "i32" else word)
        f.do(f"call void {f.load('ptr', record, 8).name}({', '.join(map(str, given))})")
        f.end()
    _add_append(module)
    return module.text()


def _add_append(module: Module) -> None:
    f = Function(module, "append", [("ptr", "record")])
    record = f.arguments["record"]
    words = {
        name: f.load("ptr" if name in _POINTERS else "i64", f.offset(record, 8 * i), 8)
        for i, name in enumerate(APPEND_RECORD)
    }
    f.module.declare("declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)")
    heads = words["num_kv_heads"]

    def row(r: Value, _: list[Value]) -> list[Value]:
        count = f.load("i64", f.offset(words["counts"], f.times(r, 8)), 8)
        ordinal = f.binary("sub", count, words["sink_tokens"])
        in_sinks = f.value("i1", f"icmp slt {ordinal}, 0")
        within = f.binary("add", words["sink_tokens"], f.binary("urem", ordinal, words["ring_tokens"]))
        slot = f.value("i64", f"select {in_sinks}, {count}, {within}")

        def head(h: Value, _: list[Value]) -> list[Value]:
            slab = f.binary("add", f.binary("mul", r, words["num_slab_heads"]), h)
            at = f.binary("add", f.binary("mul", slab, words["slots"]), slot)
            for name in ("key", "value"):
                width = words[f"{name}_bytes"]
                source = f.offset(words[f"new_{name}s"], f.binary("mul", r, words[f"new_{name}_stride"]))
                source = f.offset(source, f.binary("mul", h, words[f"new_{name}_head_stride"]))
                target = f.offset(words[f"{name}s"], f.binary("mul", at, width))
                f.do(f"call void @llvm.memcpy.p0.p0.i64({target}, {source}, {width}, i1 false)")
            return []

        f.loop(heads, [], head)
        return []

    f.loop(words["num_rows"], [], row)
    f.end()
