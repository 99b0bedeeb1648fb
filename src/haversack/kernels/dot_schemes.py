"""How one chunk of packed codes meets one chunk of activations, per instruction set.

A scheme turns a chunk of a packed row into a few vectors of weights and says which columns each lane holds; activations
are laid out in that order once per call (`ir_prepare`), so that the inner loop is load, shift, look up, multiply-add.

    avx512-bf16   words looked up as bfloat16 (vpermw), vdpbf16ps against bfloat16 activations (two terms for float32)
    avx512-f32    double words looked up as float32 (vpermps), fused multiply-add
    avx512-vnni   bytes shifted and masked, vpdpbusd against int8 activations
    vectors-f32   plain vectors that LLVM legalises for any CPU: bytes extended to float32, fused multiply-add
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from haversack.codecs.bitpack import UNIT_COLUMNS
from haversack.kernels.format import PackedFormat
from haversack.kernels.ir import Function, Value, constant, float_constant, splat_constant, vector, zeros
from haversack.kernels.llvm import Target


@dataclass(frozen=True)
class Operand:
    """A vector of weights, and the number of the activation vector it is multiplied with."""

    weights: Value
    activations: int


class DotScheme(ABC):
    """Sixteen lanes of accumulators; everything about a chunk that depends on the instruction set."""

    name: ClassVar[str]
    lanes: ClassVar[int] = 16
    accumulator: ClassVar[str] = "<16 x float>"
    activation_bits: ClassVar[int] = 16
    features: ClassVar[tuple[str, ...]]

    def __init__(self, fmt: PackedFormat, target: Target):
        self.bits = bits = fmt.bits
        self.table = fmt.table
        self.target = target
        self.base = 2 if bits == 3 else bits  # 3-bit rows are a 2-bit row and a 1-bit row
        self.unit_bytes = 8 * self.base
        self.chunk_bytes = max(64, self.unit_bytes)
        self.chunk_units = self.chunk_bytes // self.unit_bytes
        self.chunk_columns = UNIT_COLUMNS * self.chunk_units

    def runs_on(self, target: Target) -> bool:
        return target.has(*self.features)

    @property
    @abstractmethod
    def activation_columns(self) -> Sequence[Sequence[int]]:
        """Per activation vector of a chunk, the column (within the chunk) of each element."""

    @property
    @abstractmethod
    def activation_element(self) -> str:
        """Element type of an activation vector."""

    @property
    def holds_table(self) -> bool:
        """Whether values of a table, if there is one, are held exactly."""
        return True

    @property
    def code_values(self) -> list[float]:
        """The value of every code, before its scale."""
        return list(self.table or (q - (1 << (self.bits - 1)) for q in range(1 << self.bits)))

    @abstractmethod
    def operands(self, f: Function, low: Value, high: Value | None, num_units: int) -> list[Operand]:
        """Weights of a chunk of `num_units` units at `low` (and, at 3 bits, the high bits at `high`)."""

    def offsets(self) -> Sequence[Value] | None:
        """Where weights come with a constant added, that constant (as a vector of weights) per activation vector.

        It is taken off once per segment: accumulators start at minus the constants' product with the activations.
        """
        return None

    @abstractmethod
    def dot(self, f: Function, accumulator: Value, weights: Value, activations: Value) -> Value:
        """Accumulators plus lane-wise products."""

    def column_of(self, byte: int, plane: int) -> int:
        unit, j = divmod(byte, self.unit_bytes)
        return unit * UNIT_COLUMNS + plane * self.unit_bytes + j

    def _chunk(self, f: Function, pointer: Value, num_bytes: int) -> Value:
        """64 bytes, zero beyond `num_bytes`."""
        if num_bytes == 64:
            return f.load("<64 x i8>", pointer)
        part = f.load(vector(num_bytes, "i8"), pointer)
        mask = [i if i < num_bytes else num_bytes for i in range(64)]
        return f.shuffle(part, zeros(part.type), mask)

    def _high_bits(self, f: Function, pointer: Value, num_units: int) -> Value:
        """The 1-bit row of a 3-bit chunk beside its 2-bit row: bit 2P of byte j is the high bit of plane P, byte j."""
        part = f.load(vector(8 * num_units, "i8"), pointer)
        spread = f.shuffle(part, zeros(part.type), [_spread(j, num_units) for j in range(64)])
        words = f.cast("bitcast", spread, "<8 x i64>")
        shifted = f.binary("lshr", words, constant("i64", [0, 1] * 4))
        return f.cast("bitcast", shifted, "<64 x i8>")


def _spread(byte: int, num_units: int) -> int:
    """Source byte of the 1-bit row for byte `byte` of a chunk: each unit's eight bytes twice."""
    unit, j = divmod(byte, 16)
    return unit * 8 + j % 8 if unit < num_units else 8 * num_units


class Avx512Bf16(DotScheme):
    """Two columns per lane and instruction; weights are exact in bfloat16, and products in float32.

    4-bit codes are looked up straight from their 16-bit words, garbage and all: only the low bits of the index matter,
    because the table of 32 repeats. 8-bit codes are two lookups, of 16 * high - 128 and of low. Codes of 2 and 3 bits
    are put into the mantissa of 2^(7-p) where they lie, at bit p of a word, which makes 2^(7-p) + code in one
    instruction (`(word & mask) | exponent`); those offsets cost up to 6 of the 24 bits that sums are kept in. With a table
    they are looked up, as 4-bit codes are.
    """

    name = "avx512-bf16"
    features = ("avx512bf16", "avx512bw", "avx512f")
    activation_element = "bfloat"

    @property
    def holds_table(self) -> bool:
        """Values of bfloat16's precision."""
        return self.table is None or all(_is_bf16(value) for value in self.table)

    @property
    def activation_columns(self) -> list[list[int]]:
        if self.bits == 8:
            return [[2 * word + half for word in range(32)] for half in range(2)]
        return [
            [self.column_of(2 * word + half, plane) for word in range(32)]
            for plane in range(8 // self.base)
            for half in range(2)
        ]

    def operands(self, f: Function, low: Value, high: Value | None, num_units: int) -> list[Operand]:
        words = f.cast("bitcast", self._chunk(f, low, num_units * self.unit_bytes), "<32 x i16>")
        if self.bits == 8:
            tables = [_bf16_table([float(q) for q in range(16)]), _bf16_table([16.0 * q - 128 for q in range(16)])]
            return [Operand(self._look_up(f, tables[s % 2], _shift(f, words, 4 * s)), s // 2) for s in range(4)]
        if high is None:
            sources = {0: words}
        else:  # bits 0-2 and 4-6 of each byte: planes 0 and 2, then planes 1 and 3
            bits = f.cast("bitcast", self._high_bits(f, high, num_units), "<32 x i16>")
            even = _merge(f, words, _shift(f, bits, -2), 0x3333)
            odd = _merge(f, _shift(f, words, 2), bits, 0x3333)
            sources = {0: even, 1: odd}
        if self._looks_up:
            table = _bf16_table(self.code_values)
            return [
                Operand(self._look_up(f, table, _shift(f, sources[source], bit)), number)
                for number, (source, bit) in enumerate(self._places())
            ]
        shifted: dict[tuple[int, int], Value] = {}
        found = []
        for number, (source, shift, position) in enumerate(self._mantissas()):
            if (source, shift) not in shifted:
                shifted[source, shift] = _shift(f, sources[source], shift)
            mask = ((1 << self.bits) - 1) << position
            code = f.binary("and", shifted[source, shift], splat_constant("<32 x i16>", mask))
            value = f.binary("or", code, splat_constant("<32 x i16>", _bf16_bits(2.0 ** (7 - position))))
            found.append(Operand(f.cast("bitcast", value, "<32 x bfloat>"), number))
        return found

    def offsets(self) -> list[Value] | None:
        if self._looks_up or self.bits == 8:
            return None
        centre = 1 << (self.bits - 1)
        bits = [_bf16_bits(2.0 ** (7 - position) + centre) for _, _, position in self._mantissas()]
        return [
            Value("<32 x bfloat>", f"bitcast (<32 x i16> {splat_constant('<32 x i16>', b).name} to <32 x bfloat>)")
            for b in bits
        ]

    @property
    def _looks_up(self) -> bool:
        """Whether each code is one lookup: 2 and 3 bits without a table are not."""
        return self.bits == 4 or (self.table is not None and self.bits < 8)

    def _places(self) -> list[tuple[int, int]]:
        """Per activation vector (2 * plane + half): source, and the code's lowest bit in its words."""
        if self.bits == 3:
            return [(plane % 2, 8 * half + 4 * (plane // 2)) for plane in range(4) for half in range(2)]
        return [(0, 8 * half + self.bits * plane) for plane in range(8 // self.bits) for half in range(2)]

    def _mantissas(self) -> list[tuple[int, int, int]]:
        """Per activation vector: source, right shift, and bit position in the shifted word."""
        step = 6 if self.bits == 2 else 8
        return [(source, bit // step * step, bit % step) for source, bit in self._places()]

    def dot(self, f: Function, accumulator: Value, weights: Value, activations: Value) -> Value:
        return f.call("<16 x float>", "llvm.x86.avx512bf16.dpbf16ps.512", accumulator, weights, activations)

    def _look_up(self, f: Function, table: Value, index: Value) -> Value:
        found = f.call("<32 x i16>", "llvm.x86.avx512.permvar.hi.512", table, index)
        return f.cast("bitcast", found, "<32 x bfloat>")


class Avx512F32(DotScheme):
    """One column per lane and instruction, float32 activations; 8-bit codes are converted, not looked up."""

    name = "avx512-f32"
    features = ("avx512f", "avx512bw")
    activation_element = "float"

    @property
    def activation_columns(self) -> list[list[int]]:
        if self.bits == 8:
            return [[16 * part + lane for lane in range(16)] for part in range(4)]
        return [
            [self.column_of(4 * lane + byte, plane) for lane in range(16)]
            for plane in range(8 // self.base)
            for byte in range(4)
        ]

    def operands(self, f: Function, low: Value, high: Value | None, num_units: int) -> list[Operand]:
        if self.bits == 8:
            return [Operand(_bytes_to_float(f, f.load("<16 x i8>", f.offset(low, 16 * i)), 128), i) for i in range(4)]
        table = _float_table(self.code_values)
        words = f.cast("bitcast", self._chunk(f, low, num_units * self.unit_bytes), "<16 x i32>")
        bits = f.cast("bitcast", self._high_bits(f, high, num_units), "<16 x i32>") if high is not None else None
        found = []
        for plane in range(8 // self.base):
            codes = _shift(f, words, self.base * plane)
            if bits is not None:
                codes = _merge(f, codes, _shift(f, bits, 2 * plane - 2), 0x03030303)
            for byte in range(4):
                index = _shift(f, codes, 8 * byte)
                weights = f.call("<16 x float>", "llvm.x86.avx512.permvar.sf.512", table, index)
                found.append(Operand(weights, 4 * plane + byte))
        return found

    def dot(self, f: Function, accumulator: Value, weights: Value, activations: Value) -> Value:
        return multiply_add(f, weights, activations, accumulator)


class Avx512Vnni(DotScheme):
    """Four columns per lane and instruction: unsigned codes times int8 activations, summed in int32, exactly.

    The code that stands for zero is taken off once per segment, through the accumulator's start (`offsets`).
    """

    name = "avx512-vnni"
    features = ("avx512vnni", "avx512bw", "avx512f")
    accumulator = "<16 x i32>"
    activation_bits = 8
    activation_element = "i8"

    @property
    def holds_table(self) -> bool:
        """Values of a table aren't the consecutive integers that codes stand for here."""
        return self.table is None

    @property
    def activation_columns(self) -> list[list[int]]:
        return [[self.column_of(byte, plane) for byte in range(64)] for plane in range(8 // self.base)]

    def operands(self, f: Function, low: Value, high: Value | None, num_units: int) -> list[Operand]:
        words = f.cast("bitcast", self._chunk(f, low, num_units * self.unit_bytes), "<16 x i32>")
        bits = f.cast("bitcast", self._high_bits(f, high, num_units), "<16 x i32>") if high is not None else None
        mask = ((1 << self.bits) - 1) * 0x01010101
        found = []
        for plane in range(8 // self.base):
            codes = _shift(f, words, self.base * plane)
            if bits is not None:
                codes = _merge(f, codes, _shift(f, bits, 2 * plane - 2), 0x03030303)
            if self.bits < 8:
                codes = f.binary("and", codes, splat_constant(codes.type, mask))
            found.append(Operand(codes, plane))
        return found

    def offsets(self) -> list[Value]:
        word = (1 << (self.bits - 1)) * 0x01010101
        return [splat_constant("<16 x i32>", word - (word >> 31 << 32))] * len(self.activation_columns)

    def dot(self, f: Function, accumulator: Value, weights: Value, activations: Value) -> Value:
        activations = f.cast("bitcast", activations, "<16 x i32>")
        return f.call("<16 x i32>", "llvm.x86.avx512.vpdpbusd.512", accumulator, weights, activations)


class VectorsF32(DotScheme):
    """Sixteen bytes at a time to float32. No intrinsic: LLVM splits the vectors to whatever the CPU has."""

    name = "vectors-f32"
    features = ()
    activation_element = "float"

    def __init__(self, fmt: PackedFormat, target: Target):
        super().__init__(fmt, target)
        self.chunk_bytes = self.unit_bytes
        self.chunk_units, self.chunk_columns = 1, UNIT_COLUMNS

    @property
    def activation_columns(self) -> list[list[int]]:
        return [[16 * part + lane for lane in range(16)] for part in range(4)]

    def operands(self, f: Function, low: Value, high: Value | None, num_units: int) -> list[Operand]:
        found = []
        pieces = [f.load("<16 x i8>", f.offset(low, 16 * i)) for i in range(self.unit_bytes // 16)]
        bits = None
        if high is not None:
            part = f.load("<8 x i8>", high)
            bits = f.binary("lshr", f.shuffle(part, None, [*range(8), *range(8)]), constant("i8", [0] * 8 + [1] * 8))
        for plane in range(8 // self.base):
            for i, piece in enumerate(pieces):
                codes = _shift(f, piece, self.base * plane)
                if bits is not None:
                    codes = _merge(f, codes, _shift(f, bits, 2 * plane - 2), 0x03)
                if self.bits < 8:
                    codes = f.binary("and", codes, splat_constant(codes.type, (1 << self.bits) - 1))
                weights = self._look_up(f, codes) if self.table else _bytes_to_float(f, codes, 1 << (self.bits - 1))
                found.append(Operand(weights, plane * len(pieces) + i))
        return found

    def dot(self, f: Function, accumulator: Value, weights: Value, activations: Value) -> Value:
        return multiply_add(f, weights, activations, accumulator)

    def _look_up(self, f: Function, codes: Value) -> Value:
        """Values of sixteen codes (bytes): one permutation, or sixteen loads where the CPU has none that wide."""
        index = f.cast("zext", codes, "<16 x i32>")
        table = _float_table(self.code_values)
        if self.target.has("avx512f"):
            return f.call("<16 x float>", "llvm.x86.avx512.permvar.sf.512", table, index)
        found = Value("<16 x float>", "poison")
        f.module.declare(f"@values = private unnamed_addr constant {table}, align 64")
        for lane in range(16):
            code = f.cast("zext", f.value("i32", f"extractelement {index}, i32 {lane}"), "i64")
            value = f.load("float", f.offset(Value("ptr", "@values"), f.times(code, 4)), 4)
            found = f.value(found.type, f"insertelement {found}, {value}, i32 {lane}")
        return found


SCHEMES: tuple[type[DotScheme], ...] = (Avx512Bf16, Avx512F32, Avx512Vnni, VectorsF32)
"""Fast to general."""


def multiply_add(f: Function, a: Value, b: Value, c: Value) -> Value:
    """`a * b + c`, fused where the CPU can."""
    lanes = a.type.split(" ")[0][1:]
    return f.call(a.type, f"llvm.fmuladd.v{lanes}f32", a, b, c)


def _bytes_to_float(f: Function, codes: Value, zero: int) -> Value:
    """uint8 codes minus `zero`, in float32. The difference fits a signed byte for every width."""
    lanes = codes.type.split(" ")[0][1:]
    centred = f.binary("sub", codes, splat_constant(codes.type, zero - 256 if zero > 127 else zero))
    return f.cast("sitofp", f.cast("sext", centred, f"<{lanes} x i32>"), f"<{lanes} x float>")


def _shift(f: Function, a: Value, right_bits: int) -> Value:
    """Shift right by a constant, left if it is negative."""
    if right_bits == 0:
        return a
    return f.binary("lshr" if right_bits > 0 else "shl", a, splat_constant(a.type, abs(right_bits)))


def _merge(f: Function, a: Value, b: Value, mask: int) -> Value:
    """Bits of `a` where the mask is set, of `b` elsewhere (one vpternlog)."""
    ones = splat_constant(a.type, mask)
    difference = f.binary("xor", a, b)
    return f.binary("xor", f.binary("and", difference, ones), b)


def _bf16_table(values: Sequence[float]) -> Value:
    """Thirty-two words: the values in bfloat16, repeated."""
    words = [_bf16_bits(v) for v in values]
    return constant("i16", words * (32 // len(words)))


def _float_table(values: Sequence[float]) -> Value:
    """Sixteen floats: the values, repeated. Spelled as the bits of a double, which holds them exactly."""
    return constant("float", [float_constant(value) for value in values] * (16 // len(values)))


def _is_bf16(value: float) -> bool:
    return struct.unpack("<f", struct.pack("<f", value))[0] == value and struct.pack("<f", value)[:2] == bytes(2)


def _bf16_bits(value: float) -> int:
    """bfloat16 bits of a number that is exact there."""
    return int.from_bytes(struct.pack("<f", value), "little") >> 16
