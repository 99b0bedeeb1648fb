"""LLVM IR of attention to a group of packed tokens sixty-four bytes of codes at a time: for CPUs with AVX-512, 2 and 4 bits.

A chunk of 64 bytes holds several tokens' rows, or a part of one. Its double words are shifted so that a plane's codes of one
byte in four lie lowest, and looked up as float32 (vpermps reads four bits of an index, and the table repeats): sixteen codes
in two instructions. A lane then belongs to one token and one channel, so queries and probabilities are laid out likewise,
once per group, and sums over a token's lanes are taken for sixteen tokens together. Codes are exact; sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from haversack.kernels.dot_schemes import multiply_add
from haversack.kernels.ir import Function, Value, constant, float_constant, lanes_of, splat_constant, vector, zeros
from haversack.kernels.ir_float import half_to_float
from haversack.kernels.llvm import Target

_F16 = "<16 x float>"
CHUNK_BYTES = 64

MAX_SUMS = 16
"""Sums that are kept in registers at a time, beside codes and what they are multiplied with."""


@dataclass(frozen=True)
class ChunkForm:
    """How rows of `channels` codes, in layout `kv-tokens-v1`, lie in chunks. A *word* is what one lookup gives: the codes of
    one plane and one byte of every double word, in one of the chunks that a row takes."""

    bits: int
    channels: int
    group_size: int

    def is_supported(self, target: Target) -> bool:
        """Rows fill chunks evenly, and a word's channels belong to at most two groups."""
        rows_fit = self.row_bytes >= 8 and (CHUNK_BYTES % self.row_bytes == 0 or self.row_bytes % CHUNK_BYTES == 0)
        return self.bits in (2, 4) and rows_fit and target.has("avx512f", "avx512bw") and self.group_size % 32 == 0

    @cached_property
    def row_bytes(self) -> int:
        return self.channels * self.bits // 8

    @cached_property
    def chunk_tokens(self) -> int:
        return max(1, CHUNK_BYTES // self.row_bytes)

    @cached_property
    def token_lanes(self) -> int:
        """Lanes of a word that belong to one token, side by side."""
        return 16 // self.chunk_tokens

    @property
    def span(self) -> int:
        """Channels, side by side, of the four words of one plane."""
        return 4 * self.token_lanes

    @cached_property
    def words(self) -> list[tuple[int, int, int]]:
        """Chunk of the row, plane, and byte of the double word, in the order in which queries are laid out."""
        chunks = max(1, self.row_bytes // CHUNK_BYTES)
        return [(c, plane, byte) for c in range(chunks) for plane in range(8 // self.bits) for byte in range(4)]

    @property
    def ordered_bytes(self) -> int:
        """Bytes of one query row in the order of words."""
        return 64 * len(self.words)

    def first_channel(self, chunk: int, plane: int) -> int:
        return plane * self.row_bytes + CHUNK_BYTES * chunk

    def lanes(self, byte: int) -> list[int]:
        """Per lane of a word its channel, counted from the plane's first in the chunk."""
        return [4 * (lane % self.token_lanes) + byte for lane in range(16)]

    def weight_lanes(self, chunk: int, plane: int) -> tuple[tuple[int, int], ...]:
        """Per lane of a word its token in the chunk and its group of channels, which are those of every byte."""
        first = self.first_channel(chunk, plane)
        return tuple(
            (lane // self.token_lanes, (first + 4 * (lane % self.token_lanes)) // self.group_size) for lane in range(16)
        )

    @cached_property
    def weight_patterns(self) -> list[tuple[tuple[int, int], ...]]:
        return list(dict.fromkeys(self.weight_lanes(chunk, plane) for chunk, plane, _ in self.words))

    @cached_property
    def pattern_numbers(self) -> dict[tuple[int, int], int]:
        """Number of the pattern of a chunk's plane."""
        return {(c, p): self.weight_patterns.index(self.weight_lanes(c, p)) for c, p, _ in self.words}

    @cached_property
    def code_table(self) -> Value:
        """The float32 of every code, repeated."""
        values = [float_constant(float(code)) for code in range(1 << self.bits)]
        return constant("float", values * (16 // len(values)))

    def expanded_bytes(self, rows: int, tokens: int) -> int:
        """Bytes of probabilities in the order of words' lanes: per row, pattern and chunk of tokens."""
        return 64 * rows * len(self.weight_patterns) * (tokens // self.chunk_tokens)

    def code_numbers(self, f: Function, codes: Value, plane: int, byte: int) -> Value:
        """The codes of one word as float32."""
        shift = 8 * byte + self.bits * plane
        index = f.binary("lshr", codes, splat_constant(codes.type, shift)) if shift else codes
        return f.call(_F16, "llvm.x86.avx512.permvar.sf.512", self.code_table, index)


def order_query(f: Function, form: ChunkForm, query: Value, ordered: Value, rows: int) -> None:
    """Query rows `(rows, channels)`, float32, in the order of words: word by word, row by row."""
    for w, (chunk, plane, byte) in enumerate(form.words):
        for r in range(rows):
            at = 4 * (r * form.channels + form.first_channel(chunk, plane))
            natural = f.load(vector(form.span, "float"), f.offset(query, at), 4)
            f.store(f.shuffle(natural, None, form.lanes(byte)), f.offset(ordered, 64 * (w * rows + r)), 64)


def fold_key_scales(
    f: Function, form: ChunkForm, ordered: Value, scales: Value, folded: Value, rows: int, target: Target
) -> None:
    """Ordered queries times the group's key scales, float16 `(channels,)`, into `folded`."""
    for w, (chunk, plane, byte) in enumerate(form.words):
        bits = f.load(vector(form.span, "i16"), f.offset(scales, 2 * form.first_channel(chunk, plane)), 2)
        scale = half_to_float(f, f.shuffle(bits, None, form.lanes(byte)), target)
        for r in range(rows):
            at = 64 * (w * rows + r)
            q = f.load(_F16, f.offset(ordered, at), 64)
            f.store(f.binary("fmul", q, scale), f.offset(folded, at), 64)


def write_scores(
    f: Function, form: ChunkForm, folded: Value, codes: Value, scores: Value, rows: int, tokens: int, first: Value
) -> None:
    """Dot products of every folded row with `tokens` keys into `scores` `(rows, tokens)`; minus infinity before `first`."""
    abreast = 16 // form.chunk_tokens  # chunks whose sums are kept in registers
    while abreast > 1 and abreast * rows > MAX_SUMS:
        abreast //= 2

    def sixteen(start: Value, _: list[Value]) -> Sequence[Value]:
        """Tokens `start ... start + 15`."""
        base = f.offset(codes, f.times(start, form.row_bytes))
        sums: list[list[Value]] = [[] for _ in range(rows)]
        for begin in range(0, 16 // form.chunk_tokens, abreast):
            part = _chunk_scores(f, form, folded, base, rows, range(begin, begin + abreast))
            for r in range(rows):
                sums[r] += part[r]
        hidden = f.binary("sub", first, start)
        lanes = constant("i32", range(16))
        before = f.splat(f.cast("trunc", hidden, "i32"), 16)
        is_hidden = f.value("<16 x i1>", f"icmp slt {lanes}, {before.name}")
        none = splat_constant(_F16, "0xFFF0000000000000")
        for r in range(rows):
            total = merged_sums(f, sums[r], form.chunk_tokens)
            place = f.offset(f.offset(scores, 4 * tokens * r), f.times(start, 4))
            f.store(f.value(_F16, f"select {is_hidden}, {none}, {total}"), place, 64)
        return []

    f.loop(tokens, [], sixteen, step=16)


def _chunk_scores(
    f: Function, form: ChunkForm, folded: Value, base: Value, rows: int, chunks: Sequence[int]
) -> list[list[Value]]:
    """Per query row and chunk, sums that belong to the chunk's tokens, some lanes each."""
    sums = [[zeros(_F16)] * len(chunks) for _ in range(rows)]
    loaded: dict[int, list[Value]] = {}
    step = form.chunk_tokens * form.row_bytes
    for w, (part, plane, byte) in enumerate(form.words):
        if part not in loaded:
            places = [f.offset(base, step * c + CHUNK_BYTES * part) for c in chunks]
            loaded[part] = [f.load("<16 x i32>", place) for place in places]
        numbers = [form.code_numbers(f, codes, plane, byte) for codes in loaded[part]]
        for r in range(rows):
            q = f.load(_F16, f.offset(folded, 64 * (w * rows + r)), 64)
            for c, number in enumerate(numbers):
                sums[r][c] = multiply_add(f, number, q, sums[r][c])
    return sums


def merged_sums(f: Function, vectors: list[Value], tokens: int) -> Value:
    """One vector of a sum per token, from vectors of `tokens` each whose lanes, side by side, are still to be added."""
    lanes = 16 // tokens
    while lanes > 1:
        half = lanes // 2
        pairs = list(zip(vectors[::2], vectors[1::2], strict=True)) if len(vectors) > 1 else [(vectors[0], vectors[0])]
        lower = [start + i for start in range(0, 32, lanes) for i in range(half)]
        vectors = [
            f.binary("fadd", f.shuffle(a, b, lower), f.shuffle(a, b, [lane + half for lane in lower])) for a, b in pairs
        ]
        lanes = half
    return vectors[0]


def expand_weights(
    f: Function, form: ChunkForm, weights: Value, expanded: Value, rows: int, groups: int, tokens: int
) -> None:
    """Folded probabilities `(rows, groups, tokens)` lane by lane."""
    chunks = tokens // form.chunk_tokens

    def sixteen(start: Value, _: list[Value]) -> Sequence[Value]:
        for r in range(rows):
            for p, pattern in enumerate(form.weight_patterns):
                both = list(dict.fromkeys(group for _, group in pattern))
                assert len(both) <= 2
                sources = [
                    f.load(_F16, f.offset(f.offset(weights, 4 * (r * groups + g) * tokens), f.times(start, 4)), 64)
                    for g in both
                ]
                at = f.offset(expanded, 64 * (r * len(form.weight_patterns) + p) * chunks)
                at = f.offset(at, f.times(start, 64 // form.chunk_tokens))
                for c in range(16 // form.chunk_tokens):
                    mask = [16 * both.index(g) + c * form.chunk_tokens + token for token, g in pattern]
                    f.store(f.shuffle(sources[0], sources[-1], mask), f.offset(at, 64 * c), 64)
        return []

    f.loop(tokens, [], sixteen, step=16)


def add_values(
    f: Function, form: ChunkForm, expanded: Value, codes: Value, outputs: Value, rows: int, tokens: int
) -> None:
    """`outputs` `(rows, channels)`, float32, plus expanded probabilities times the codes of `tokens` values."""
    chunks = tokens // form.chunk_tokens
    step = form.chunk_tokens * form.row_bytes
    per_pass = max(1, MAX_SUMS // rows)
    for part in dict.fromkeys(chunk for chunk, _, _ in form.words):
        words = [word for word in form.words if word[0] == part]
        done: dict[tuple[int, int], list[Value]] = {}  # sums per row, by plane and byte
        for begin in range(0, len(words), per_pass):
            taken = words[begin : begin + per_pass]

            def chunk(
                c: Value, sums: list[Value], taken: list[tuple[int, int, int]] = taken, part: int = part
            ) -> list[Value]:
                loaded = f.load("<16 x i32>", f.offset(f.offset(codes, f.times(c, step)), CHUNK_BYTES * part))
                numbers = [form.code_numbers(f, loaded, plane, byte) for _, plane, byte in taken]
                result = []
                for r in range(rows):
                    by_pattern: dict[int, Value] = {}
                    for k, (_, plane, _) in enumerate(taken):
                        p = form.pattern_numbers[part, plane]
                        if p not in by_pattern:
                            at = f.offset(expanded, 64 * (r * len(form.weight_patterns) + p) * chunks)
                            by_pattern[p] = f.load(_F16, f.offset(at, f.times(c, 64)), 64)
                        result.append(multiply_add(f, numbers[k], by_pattern[p], sums[r * len(taken) + k]))
                return result

            sums = f.loop(chunks, [zeros(_F16)] * (rows * len(taken)), chunk)
            for k, (_, plane, byte) in enumerate(taken):
                done[plane, byte] = [sums[r * len(taken) + k] for r in range(rows)]
                if byte == 3:
                    _add_span(f, form, [done[plane, b] for b in range(4)], outputs, form.first_channel(part, plane))


def _add_span(f: Function, form: ChunkForm, sums: list[list[Value]], outputs: Value, channel: int) -> None:
    """A plane's channels of one chunk, from sums per byte and row: added over tokens, and put into order."""
    lanes, width = form.token_lanes, min(16, form.span)
    for r in range(len(sums[0])):
        halves = [f.shuffle(sums[b][r], sums[b + 1][r], range(32)) for b in (0, 2)]
        for start in range(0, form.span, width):
            inside = range(start, start + width)
            total: Value | None = None
            for token in range(form.chunk_tokens):
                mask = [16 * (c % 4) + token * lanes + c // 4 for c in inside]
                found = f.shuffle(halves[0], halves[1], mask)
                total = found if total is None else f.binary("fadd", total, found)
            assert total is not None and lanes_of(total.type) == width
            place = f.offset(outputs, 4 * (r * form.channels + channel + start))
            f.store(f.binary("fadd", f.load(total.type, place, 4), total), place, 4)
