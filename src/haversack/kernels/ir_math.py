"""LLVM IR of the mathematics between dot products: exponentials, caps, the larger and the smaller; numbers of any float type."""

from __future__ import annotations

from haversack.kernels.dot_schemes import multiply_add
from haversack.kernels.ir import Function, Value, float_constant, splat_constant
from haversack.kernels.ir_float import bits_of, float_bytes, floats_of
from haversack.kernels.llvm import Target

_F16 = "<16 x float>"


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
    value = splat_constant(_F16, float_constant(1 / 720))
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        value = multiply_add(f, value, rest, splat_constant(_F16, float_constant(coefficient)))
    exponent = f.cast("fptosi", whole, "<16 x i32>")
    bits = f.binary("shl", exponent, splat_constant(exponent.type, 23))
    return f.cast("bitcast", f.binary("add", f.cast("bitcast", value, "<16 x i32>"), bits), _F16)


def capped(f: Function, x: Value, softcap: float) -> Value:
    """softcap * tanh(x / softcap), as softcap - 2 softcap / (1 + exp(2 x / softcap))."""
    grown = f.binary("fmul", x, splat_constant(_F16, float_constant(2 / softcap)))
    limit = splat_constant(_F16, "8.000000e+01")  # exp stays finite, tanh is 1 long before
    above = f.value("<16 x i1>", f"fcmp ogt {grown}, {limit.name}")
    power = exponential(f, f.value(_F16, f"select {above}, {limit}, {grown}"))
    bottom = f.binary("fadd", power, splat_constant(_F16, "1.000000e+00"))
    part = f.value(_F16, f"fdiv {splat_constant(_F16, float_constant(2 * softcap))}, {bottom.name}")
    capped = f.value(_F16, f"fsub {splat_constant(_F16, float_constant(softcap))}, {part.name}")
    # a place without a token stays minus infinity
    none = f.value("<16 x i1>", f"fcmp oeq {x}, {splat_constant(_F16, '0xFFF0000000000000').name}")
    return f.value(_F16, f"select {none}, {x}, {capped}")


def multiply_add_scalar(f: Function, a: Value, b: Value, c: Value) -> Value:
    return f.binary("fadd", f.binary("fmul", a, b), c)


def larger(f: Function, a: Value, b: Value) -> Value:
    bool_type = "i1" if a.type == "float" else "<16 x i1>"
    more = f.value(bool_type, f"fcmp ogt {a}, {b.name}")
    return f.value(a.type, f"select {more}, {a}, {b}")


def at_least(f: Function, a: Value, limit: int) -> Value:
    less = f.value("i1", f"icmp slt {a}, {limit}")
    return f.value("i64", f"select {less}, i64 {limit}, {a}")


def larger_int(f: Function, a: Value, b: Value) -> Value:
    less = f.value("i1", f"icmp slt {a}, {b.name}")
    return f.value("i64", f"select {less}, {b}, {a}")


def smaller_int(f: Function, a: Value, b: Value) -> Value:
    less = f.value("i1", f"icmp slt {a}, {b.name}")
    return f.value("i64", f"select {less}, {a}, {b}")


def smaller_than(f: Function, a: Value, limit: int) -> Value:
    less = f.value("i1", f"icmp slt {a}, {limit}")
    return f.value("i64", f"select {less}, {a}, i64 {limit}")


def load_floats(f: Function, dtype: str, pointer: Value, target: Target) -> Value:
    """Sixteen numbers of `dtype` as float32."""
    size = float_bytes(dtype)
    return floats_of(f, f.load(_F16 if size == 4 else "<16 x i16>", pointer, size), dtype, target)


def store_floats(f: Function, dtype: str, value: Value, pointer: Value, target: Target) -> None:
    """Sixteen float32 as numbers of `dtype`, to nearest even."""
    f.store(bits_of(f, value, dtype, target), pointer, float_bytes(dtype))
