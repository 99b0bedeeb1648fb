"""LLVM IR of what lies between matrix products and attention in a step of decoding: norms, rotations, activations, sums.

    rows(record)

A program is a list of steps, each a loop nest over one sequence's numbers, run for every sequence; threads take turns of
sequences. Every step computes in float32 and stores in the dtype that the model's own operation returns, so that numbers
are rounded where the model rounds them. Vectors are those of a core's cache: a step of 2,048 numbers takes some 0.1 us.
Errors: exp 2^-22 of its value, other functions what follows from it, and float32 sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from haversack.kernels.ir import Function, Module, Value, splat_constant, zeros
from haversack.kernels.ir_float import bits_of, floats_of
from haversack.kernels.ir_math import exponential
from haversack.kernels.llvm import Target

_F16 = "<16 x float>"
_LANES = 16

RECORD = ("next", "num_rows", "parallel", "threads")
"""First 64-bit words of a record; the program's pointers follow."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Operand:
    """Numbers of one sequence: `pointers[slot]`, `row_stride` elements further per sequence (0: a constant), from
    `offset` on, `strides` elements apart along the axes of the step's loop."""

    slot: int
    dtype: str
    row_stride: int
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class RowStep:
    """`output = op(inputs)` over `sizes`; a plain number among the inputs is itself. "mean" runs over the last axis."""

    op: str
    sizes: tuple[int, ...]
    inputs: tuple[Operand | float, ...]
    output: Operand


def rows_text(steps: tuple[RowStep, ...], target: Target) -> str:
    """The whole module, entry `rows`."""
    module = Module()
    f = Function(module, "row", [("ptr", "pointers"), ("i64", "row")])
    bases: dict[Operand, Value] = {}

    def base(operand: Operand) -> Value:
        """The operand's first number in this row."""
        if operand not in bases:
            pointer = f.load("ptr", f.offset(f.arguments["pointers"], 8 * operand.slot), 8)
            size = DTYPE_BYTES[operand.dtype]
            if operand.row_stride:
                pointer = f.offset(pointer, f.times(f.arguments["row"], operand.row_stride * size))
            bases[operand] = f.offset(pointer, operand.offset * size)
        return bases[operand]

    for step in steps:
        for operand in (*step.inputs, step.output):
            if isinstance(operand, Operand):
                base(operand)
        _add_step(f, step, base, target)
    f.end()
    _add_team(module)
    return module.text()


def _add_team(module: Module) -> None:
    """`rows(record)`: by a team where there are several sequences; `work(record)`: one thread's turns."""
    f = Function(module, "work", [("ptr", "record")])
    record = f.arguments["record"]
    num_rows, pointers = f.load("i64", f.offset(record, 8), 8), f.offset(record, 8 * len(RECORD))

    def turn(state: list[Value]) -> list[Value]:
        f.do(f"call void @row({pointers}, {state[0]})")
        return [f.value("i64", f"atomicrmw add {record}, i64 1 monotonic")]

    f.while_less(f.value("i64", f"atomicrmw add {record}, i64 1 monotonic"), num_rows, turn)
    f.end()
    f = Function(module, "rows", [("ptr", "record")])
    record = f.arguments["record"]
    f.store(Value("i64", "0"), record, 8)
    parallel = f.load("ptr", f.offset(record, 16), 8)
    threads = f.cast("trunc", f.load("i64", f.offset(record, 24), 8), "i32")
    several = f.value("i1", f"icmp sgt {f.load('i64', f.offset(record, 8), 8)}, 1")
    given = f.binary("and", f.value("i1", f"icmp ne {parallel}, null"), several)
    together = f.binary("and", given, f.value("i1", f"icmp sgt {threads}, 1"))
    f.when(together, lambda: f.do(f"call void {parallel.name}(ptr @work, {record}, {threads}, i32 0)"))
    f.do(f"call void @work({record})")
    f.end()


def _add_step(f: Function, step: RowStep, base: Callable[[Operand], Value], target: Target) -> None:
    """The loop nest of one step: all axes but the last one by one, the last one sixteen at a time."""

    def nest(axis: int, indices: list[Value]) -> None:
        if axis < len(step.sizes) - 1:

            def body(i: Value, _: list[Value]) -> list[Value]:
                nest(axis + 1, [*indices, i])
                return []

            f.loop(step.sizes[axis], [], body)
            return

        def start(operand: Operand) -> Value:
            pointer, size = base(operand), DTYPE_BYTES[operand.dtype]
            for i, stride in zip(indices, operand.strides):
                if stride:
                    pointer = f.offset(pointer, f.times(i, stride * size))
            return pointer

        inputs = [(x, start(x)) if isinstance(x, Operand) else x for x in step.inputs]
        if step.op == "mean":
            _add_mean(f, step, inputs[0], start(step.output), target)  # type: ignore[arg-type]
        else:
            _add_map(f, step, inputs, start(step.output), target)

    nest(0, [])


def _add_map(
    f: Function, step: RowStep, inputs: list[tuple[Operand, Value] | float], out: Value, target: Target
) -> None:
    count = step.sizes[-1]

    def at(i: Value | int, lanes: int) -> list[Value]:
        values = [
            splat_constant(_F16, _constant(x)) if isinstance(x, float) else _load(f, x[0], x[1], i, lanes, target)
            for x in inputs
        ]
        _store(f, step.output, _FUNCTIONS[step.op](f, *values), out, i, lanes, target)
        return []

    if count >= _LANES:
        whole = count // _LANES * _LANES
        f.loop(whole, [], lambda i, _: at(i, _LANES), step=_LANES)
        if whole < count:  # the last sixteen once more in part: no step writes what it reads
            at(count - _LANES, _LANES)
    else:
        at(0, count)


def _add_mean(f: Function, step: RowStep, source: tuple[Operand, Value], out: Value, target: Target) -> None:
    count = step.sizes[-1]
    operand, pointer = source
    whole = count // _LANES * _LANES

    def add(i: Value, carried: list[Value]) -> list[Value]:
        return [f.binary("fadd", carried[0], _load(f, operand, pointer, i, _LANES, target))]

    total = f.loop(whole, [zeros(_F16)], add, step=_LANES)[0]
    if whole < count:
        total = f.binary("fadd", total, _load(f, operand, pointer, whole, count - whole, target))
    f.module.declare("declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)")
    summed = f.value("float", f"call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, {total})")
    mean = f.splat(f.binary("fdiv", summed, _constant(count)), _LANES)
    _store(f, step.output, mean, out, 0, 1, target)


def _load(f: Function, operand: Operand, pointer: Value, i: Value | int, lanes: int, target: Target) -> Value:
    """`lanes` numbers from `i` on as float32 (zero beyond), or one number everywhere where the stride is 0."""
    stride, size = operand.strides[-1], DTYPE_BYTES[operand.dtype]
    element = "float" if size == 4 else "i16"
    type_ = f"<{_LANES} x {element}>"
    if stride == 0:
        found = f.splat(f.load(element, pointer, size), _LANES)
    elif stride > 1:
        found = zeros(type_)
        for lane in range(lanes):
            one = f.load(element, _element(f, pointer, i, lane, stride, size), size)
            found = f.value(type_, f"insertelement {found}, {one}, i32 {lane}")
    elif lanes == _LANES:
        found = f.load(type_, _element(f, pointer, i, 0, 1, size), size)
    else:
        kind = "f32" if size == 4 else element
        f.module.declare(f"declare {type_} @llvm.masked.load.v16{kind}.p0(ptr, i32, <16 x i1>, {type_})")
        place = _element(f, pointer, i, 0, 1, size)
        found = f.value(
            type_,
            f"call {type_} @llvm.masked.load.v16{kind}.p0({place}, i32 {size}, <16 x i1> <{_mask(lanes)}>, {type_} zeroinitializer)",
        )
    return floats_of(f, found, operand.dtype, target)


def _store(
    f: Function, operand: Operand, value: Value, pointer: Value, i: Value | int, lanes: int, target: Target
) -> None:
    stride, size = operand.strides[-1], DTYPE_BYTES[operand.dtype]
    value = bits_of(f, value, operand.dtype, target)
    element = "float" if size == 4 else "i16"
    if stride > 1:
        for lane in range(lanes):
            one = f.value(element, f"extractelement {value}, i32 {lane}")
            f.store(one, _element(f, pointer, i, lane, stride, size), size)
        return
    place = _element(f, pointer, i, 0, 1, size)
    if lanes == _LANES:
        f.store(value, place, size)
        return
    kind = "f32" if size == 4 else element
    f.module.declare(f"declare void @llvm.masked.store.v16{kind}.p0({value.type}, ptr, i32, <16 x i1>)")
    f.do(f"call void @llvm.masked.store.v16{kind}.p0({value}, {place}, i32 {size}, <16 x i1> <{_mask(lanes)}>)")


def _mask(lanes: int) -> str:
    return ", ".join(f"i1 {str(lane < lanes).lower()}" for lane in range(_LANES))


def _element(f: Function, pointer: Value, i: Value | int, lane: int, stride: int, size: int) -> Value:
    """Where number `i + lane` of an axis lies whose numbers are `stride` apart, as the halves of an interleaved rotation."""
    step = stride * size
    start = f.offset(pointer, f.times(i, step) if isinstance(i, Value) else i * step)
    return f.offset(start, lane * step) if lane else start


def _unary(intrinsic: str) -> Callable[[Function, Value], Value]:
    return lambda f, x: f.call(_F16, f"llvm.{intrinsic}.v16f32", x)


def _arithmetic(operation: str) -> Callable[[Function, Value, Value], Value]:
    return lambda f, a, b: f.binary(operation, a, b)


def _exp(f: Function, x: Value) -> Value:
    """exp, at most exp(88): what overflows only ever divides here."""
    limit = splat_constant(_F16, _constant(88.0))
    above = f.value("<16 x i1>", f"fcmp ogt {x}, {limit.name}")
    return exponential(f, f.value(_F16, f"select {above}, {limit}, {x}"))


def _sigmoid(f: Function, x: Value) -> Value:
    power = _exp(f, f.value(_F16, f"fneg {x}"))
    return _one_over(f, f.binary("fadd", power, splat_constant(_F16, _constant(1.0))))


def _one_over(f: Function, x: Value) -> Value:
    return f.value(_F16, f"fdiv {splat_constant(_F16, _constant(1.0))}, {x.name}")


def _tanh(f: Function, x: Value) -> Value:
    """1 - 2 / (1 + exp(2 x)): within 2^-23 of one."""
    one, two = (splat_constant(_F16, _constant(n)) for n in (1.0, 2.0))
    bottom = f.binary("fadd", _exp(f, f.binary("fmul", x, two)), one)
    return f.value(_F16, f"fsub {one}, {f.value(_F16, f'fdiv {two}, {bottom.name}').name}")


def _silu(f: Function, x: Value) -> Value:
    power = _exp(f, f.value(_F16, f"fneg {x}"))
    return f.binary("fdiv", x, f.binary("fadd", power, splat_constant(_F16, _constant(1.0))))


def _gelu_tanh(f: Function, x: Value) -> Value:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as PyTorch's tanh approximation."""
    square = f.binary("fmul", x, x)
    cubic = f.binary("fmul", f.binary("fmul", square, x), splat_constant(_F16, _constant(0.044715)))
    inner = f.binary("fmul", f.binary("fadd", x, cubic), splat_constant(_F16, _constant(0.7978845608028654)))
    grown = f.binary("fadd", _tanh(f, inner), splat_constant(_F16, _constant(1.0)))
    return f.binary("fmul", f.binary("fmul", x, splat_constant(_F16, _constant(0.5))), grown)


def _gelu(f: Function, x: Value) -> Value:
    """x / 2 (1 + erf(x / sqrt(2))), with erf to 1.5e-7 (Abramowitz and Stegun, formula 7.1.26)."""
    one = splat_constant(_F16, _constant(1.0))
    size = f.binary("fmul", f.call(_F16, "llvm.fabs.v16f32", x), splat_constant(_F16, _constant(0.5**0.5)))
    t = _one_over(f, f.binary("fadd", one, f.binary("fmul", size, splat_constant(_F16, _constant(0.3275911)))))
    total = splat_constant(_F16, _constant(_ERF[-1]))
    for coefficient in reversed(_ERF[:-1]):
        total = f.binary("fadd", f.binary("fmul", total, t), splat_constant(_F16, _constant(coefficient)))
    power = _exp(f, f.value(_F16, f"fneg {f.binary('fmul', size, size)}"))
    tail = f.binary("fmul", f.binary("fmul", total, t), power)  # 1 - erf(|x| / sqrt(2))
    half = f.binary("fmul", x, splat_constant(_F16, _constant(0.5)))
    negative = f.value("<16 x i1>", f"fcmp olt {x}, zeroinitializer")
    above = f.binary("fsub", splat_constant(_F16, _constant(2.0)), tail)
    return f.binary("fmul", half, f.value(_F16, f"select {negative}, {tail}, {above}"))


def _relu(f: Function, x: Value) -> Value:
    more = f.value("<16 x i1>", f"fcmp ogt {x}, zeroinitializer")
    return f.value(_F16, f"select {more}, {x}, {_F16} zeroinitializer")


_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)

_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "add": _arithmetic("fadd"),
    "sub": _arithmetic("fsub"),
    "mul": _arithmetic("fmul"),
    "div": _arithmetic("fdiv"),
    "copy": lambda f, x: x,
    "neg": lambda f, x: f.value(_F16, f"fneg {x}"),
    "square": lambda f, x: f.binary("fmul", x, x),
    "cube": lambda f, x: f.binary("fmul", f.binary("fmul", x, x), x),
    "sqrt": _unary("sqrt"),
    "rsqrt": lambda f, x: _one_over(f, f.call(_F16, "llvm.sqrt.v16f32", x)),
    "reciprocal": _one_over,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "tanh": _tanh,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
}

FUNCTIONS = frozenset(_FUNCTIONS) | {"mean"}
"""Operations that a step can be."""


def _constant(value: float) -> str:
    """A float32 constant in LLVM's spelling."""
    import struct

    rounded = struct.unpack("<f", struct.pack("<f", value))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"
