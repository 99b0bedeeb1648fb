"""A small writer of LLVM IR text: values get names, loops get their phi nodes, declarations are kept once.

Only what the kernels here need. Types are LLVM's own spelling (`<16 x float>`), values are names (`%v12`) or constants.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, overload


class Value(NamedTuple):
    """A typed value, spelled as LLVM does."""

    type: str
    name: str

    def __str__(self) -> str:
        return f"{self.type} {self.name}"


class Module:
    """Functions and declarations, in order, as text."""

    def __init__(self) -> None:
        self._declarations: dict[str, None] = {}
        self._functions: list[str] = []

    def declare(self, declaration: str) -> None:
        self._declarations.setdefault(declaration)

    def add(self, function: Function) -> None:
        self._functions.append(function.text())

    def text(self) -> str:
        return "\n".join([*self._declarations, *self._functions]) + "\n"


class Function:
    """One function while it is written. `arguments` are `(type, name)`; the body starts in block `entry`."""

    def __init__(self, module: Module, name: str, arguments: Sequence[tuple[str, str]], result: str = "void"):
        self.module = module
        self.arguments = {n: Value(t, f"%{n}") for t, n in arguments}
        listed = ", ".join(f"{t} {'noalias ' if t == 'ptr' else ''}%{n}" for t, n in arguments)
        self._head = f"define {result} @{name}({listed}) {{"
        self._lines: list[str] = ["entry:"]
        self._block = "entry"
        self._count = 0

    def text(self) -> str:
        return "\n".join([self._head, *self._lines, "}"])

    def do(self, line: str) -> None:
        self._lines.append("  " + line)

    def value(self, type_: str, expression: str) -> Value:
        """Name the result, of `type_`, of an expression."""
        self._count += 1
        name = f"%v{self._count}"
        self.do(f"{name} = {expression}")
        return Value(type_, name)

    def binary(self, operation: str, a: Value, b: Value | str | int | float) -> Value:
        return self.value(a.type, f"{operation} {a}, {b.name if isinstance(b, Value) else b}")

    def cast(self, operation: str, a: Value, type_: str) -> Value:
        return a if a.type == type_ else self.value(type_, f"{operation} {a} to {type_}")

    def call(self, result: str, name: str, *arguments: Value) -> Value:
        """Call a function or intrinsic, declaring it."""
        self.module.declare(f"declare {result} @{name}({', '.join(a.type for a in arguments)})")
        return self.value(result, f"call {result} @{name}({', '.join(map(str, arguments))})")

    def load(self, type_: str, pointer: Value, align: int = 1) -> Value:
        return self.value(type_, f"load {type_}, {pointer}, align {align}")

    def store(self, value: Value, pointer: Value, align: int = 1) -> None:
        self.do(f"store {value}, {pointer}, align {align}")

    def offset(self, pointer: Value, num_bytes: Value | int) -> Value:
        """`pointer` plus a number of bytes."""
        if num_bytes == 0:
            return pointer
        amount = num_bytes.name if isinstance(num_bytes, Value) else num_bytes
        return self.value("ptr", f"getelementptr i8, {pointer}, i64 {amount}")

    @overload
    def times(self, a: Value, factor: int) -> Value: ...
    @overload
    def times(self, a: int, factor: int) -> int: ...
    def times(self, a: Value | int, factor: int) -> Value | int:
        """A number, known now or when it runs, times a constant."""
        if isinstance(a, int):
            return a * factor
        return a if factor == 1 else self.binary("mul nuw nsw", a, factor)

    def shuffle(self, a: Value, b: Value | None, mask: Sequence[int]) -> Value:
        """Elements of a, then b, by number; -1 is undefined."""
        element = element_of(a.type)
        indices = ", ".join("i32 poison" if i < 0 else f"i32 {i}" for i in mask)
        second = b.name if b is not None else "poison"
        return self.value(
            vector(len(mask), element), f"shufflevector {a}, {a.type} {second}, <{len(mask)} x i32> <{indices}>"
        )

    def splat(self, a: Value, lanes: int) -> Value:
        """A vector of `lanes` copies of a scalar."""
        type_ = vector(lanes, a.type)
        one = self.value(type_, f"insertelement {type_} poison, {a}, i32 0")
        return self.value(type_, f"shufflevector {one}, {type_} poison, <{lanes} x i32> zeroinitializer")

    def loop(
        self,
        count: Value | int,
        carried: Sequence[Value],
        body: Callable[[Value, list[Value]], Sequence[Value]],
        first: Value | int = 0,
        step: int = 1,
    ) -> list[Value]:
        """`for i in range(first, count, step): carried = body(i, carried)`; the carried values after the last turn."""
        if isinstance(count, int) and isinstance(first, int) and first >= count:
            return list(carried)
        self._count += 1
        tag = f"loop{self._count}"
        start = first.name if isinstance(first, Value) else str(first)
        end = count.name if isinstance(count, Value) else str(count)
        before = self._block
        self.do(f"br label %{tag}.test")
        self._begin(f"{tag}.test")
        holes = len(self._lines)
        i = Value("i64", f"%{tag}.i")
        values = [Value(v.type, f"%{tag}.c{k}") for k, v in enumerate(carried)]
        self._lines += [""] * (1 + len(values))
        self.do(f"%{tag}.more = icmp slt i64 {i.name}, {end}")
        self.do(f"br i1 %{tag}.more, label %{tag}.body, label %{tag}.end")
        self._begin(f"{tag}.body")
        results = list(body(i, values))
        self.do(f"%{tag}.next = add nsw i64 {i.name}, {step}")
        after = self._block
        self.do(f"br label %{tag}.test")
        self._lines[holes] = f"  {i.name} = phi i64 [ {start}, %{before} ], [ %{tag}.next, %{after} ]"
        for k, (value, initial, result) in enumerate(zip(values, carried, results, strict=True)):
            self._lines[holes + 1 + k] = (
                f"  {value.name} = phi {value.type} [ {initial.name}, %{before} ], [ {result.name}, %{after} ]"
            )
        self._begin(f"{tag}.end")
        return values

    def while_less(self, value: Value, limit: Value, body: Callable[[list[Value]], Sequence[Value]]) -> Value:
        """`while value < limit: value = body([value])`; the value that ended it."""
        self._count += 1
        tag = f"while{self._count}"
        before = self._block
        self.do(f"br label %{tag}.test")
        self._begin(f"{tag}.test")
        hole = len(self._lines)
        self._lines.append("")
        current = Value(value.type, f"%{tag}.value")
        self.do(f"%{tag}.more = icmp slt {current}, {limit.name}")
        self.do(f"br i1 %{tag}.more, label %{tag}.body, label %{tag}.end")
        self._begin(f"{tag}.body")
        result = body([current])[0]
        after = self._block
        self.do(f"br label %{tag}.test")
        self._lines[hole] = (
            f"  {current.name} = phi {value.type} [ {value.name}, %{before} ], [ {result.name}, %{after} ]"
        )
        self._begin(f"{tag}.end")
        return current

    def when(self, condition: Value, body: Callable[[], None]) -> None:
        """Run `body` where `condition` (an i1) holds."""
        self._count += 1
        tag = f"when{self._count}"
        self.do(f"br {condition}, label %{tag}.then, label %{tag}.end")
        self._begin(f"{tag}.then")
        body()
        self.do(f"br label %{tag}.end")
        self._begin(f"{tag}.end")

    def end(self, result: Value | None = None) -> None:
        self.do("ret void" if result is None else f"ret {result}")
        self.module.add(self)

    def _begin(self, block: str) -> None:
        self._lines.append(f"{block}:")
        self._block = block


def vector(lanes: int, element: str) -> str:
    return f"<{lanes} x {element}>"


def element_of(type_: str) -> str:
    return type_.split(" x ", 1)[1][:-1] if type_.startswith("<") else type_


def lanes_of(type_: str) -> int:
    return int(type_[1 : type_.index(" ")])


def constant(element: str, values: Sequence[int | float | str]) -> Value:
    """A constant vector."""
    listed = ", ".join(f"{element} {v}" for v in values)
    return Value(vector(len(values), element), f"<{listed}>")


def zeros(type_: str) -> Value:
    return Value(type_, "zeroinitializer")


def float_constant(value: float) -> str:
    """The float32 nearest to a number, exactly, as LLVM spells floats: the bits of the double that equals it."""
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return f"0x{struct.pack('>d', rounded).hex().upper()}"


def splat_constant(type_: str, value: int | str) -> Value:
    return constant(element_of(type_), [value] * lanes_of(type_))
