"""Conversions between float16, bfloat16 and float32 in IR, by integers where a CPU has no instruction for them.

Plain `fpext` and `fptrunc` of half types would call library functions that compiled-in-process code doesn't have.
"""

from __future__ import annotations

from haversack.kernels.ir import Function, Value, lanes_of, splat_constant, vector
from haversack.kernels.llvm import Target


def converts_half(target: Target) -> bool:
    """Whether the CPU converts between float16 and float32 itself."""
    return target.has("f16c") or target.has("avx512f") or target.has("neon")


def floats_of(f: Function, bits: Value, dtype: str, target: Target) -> Value:
    """float32 of a vector as it was loaded: floats, or i16 of bfloat16 or float16."""
    if dtype == "float32":
        return bits
    return bf16_to_float(f, bits) if dtype == "bfloat16" else half_to_float(f, bits, target)


def bits_of(f: Function, value: Value, dtype: str, target: Target) -> Value:
    """A vector of float32 as it is stored in `dtype`, to nearest even: floats, or i16. float16 wants `converts_half`."""
    if dtype == "float32":
        return value
    if dtype == "bfloat16":
        return bf16_of(f, value, target)
    lanes = lanes_of(value.type)
    return f.cast("bitcast", f.cast("fptrunc", value, vector(lanes, "half")), vector(lanes, "i16"))


def half_to_float(f: Function, bits: Value, target: Target) -> Value:
    """float32 of float16 bits (a vector of i16). By integers: exact for finite values, subnormals included."""
    lanes = lanes_of(bits.type)
    type_ = vector(lanes, "float")
    if converts_half(target):
        return f.cast("fpext", f.cast("bitcast", bits, vector(lanes, "half")), type_)
    wide = vector(lanes, "i32")
    word = f.cast("zext", bits, wide)
    magnitude = f.binary("shl", f.binary("and", word, splat_constant(wide, 0x7FFF)), splat_constant(wide, 13))
    # The exponent's bias is 15 there and 127 here: multiplying by 2^112 also puts subnormals right.
    value = f.binary("fmul", f.cast("bitcast", magnitude, type_), splat_constant(type_, "0x46F0000000000000"))
    sign = f.binary("shl", f.binary("and", word, splat_constant(wide, 0x8000)), splat_constant(wide, 16))
    return f.cast("bitcast", f.binary("or", f.cast("bitcast", value, wide), sign), type_)


def scale_to_float(f: Function, bits: Value, stored: str, target: Target) -> Value:
    """float32 of stored scales: float16 ("f16"), or a byte e for 2^(e - 127), 0 for 0 ("e8m0")."""
    if stored == "f16":
        return half_to_float(f, bits, target)
    lanes = lanes_of(bits.type)
    wide = vector(lanes, "i32")
    exponent = f.binary("shl", f.cast("zext", bits, wide), splat_constant(wide, 23))
    return f.cast("bitcast", exponent, vector(lanes, "float"))


def bf16_to_float(f: Function, bits: Value) -> Value:
    """float32 of bfloat16 bits (i16 or a vector of them), exact."""
    wide = "i32" if bits.type == "i16" else vector(lanes_of(bits.type), "i32")
    amount = 16 if wide == "i32" else splat_constant(wide, 16).name
    shifted = f.value(wide, f"shl {f.cast('zext', bits, wide)}, {amount}")
    return f.cast("bitcast", shifted, "float" if wide == "i32" else vector(lanes_of(wide), "float"))


def bf16_of(f: Function, value: Value, target: Target) -> Value:
    """bfloat16 bits (i16) of float32, to nearest even; NaN stays NaN. A scalar or a vector."""
    scalar = not value.type.startswith("<")
    lanes = 1 if scalar else lanes_of(value.type)

    def type_of(element: str) -> str:
        return element if scalar else vector(lanes, element)

    def const(number: int) -> str:
        return str(number) if scalar else splat_constant(type_of("i32"), number).name

    if target.has("avx512bf16") and not scalar:
        return f.cast("bitcast", f.cast("fptrunc", value, type_of("bfloat")), type_of("i16"))
    bits = f.cast("bitcast", value, type_of("i32"))
    odd = f.binary("and", f.binary("lshr", bits, const(16)), const(1))
    rounded = f.binary("add", f.binary("add", bits, const(0x7FFF)), odd)
    flags = f.value(type_of("i1"), f"fcmp uno {value}, {value.name}")
    quiet = f.binary("or", bits, const(0x400000))
    chosen = f.value(type_of("i32"), f"select {flags}, {quiet}, {rounded}")
    return f.cast("trunc", f.binary("lshr", chosen, const(16)), type_of("i16"))


def sum_of_lanes(f: Function, lanes: Value) -> Value:
    """The sum of sixteen floats, in any order."""
    f.module.declare("declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)")
    return f.value("float", f"call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, {lanes})")


def float_bytes(form: str) -> int:
    """Of one number of a float type."""
    return 4 if form == "float32" else 2
