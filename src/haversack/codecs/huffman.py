"""Huffman codes of bytes, at most 12 bits long, row by row: layout `huffman-v1`.

A matrix of symbols (0 to 255) becomes one run of bytes. Each row begins at a byte of its own, named by `starts`; its codes
follow one another, most significant bit first, in the canonical order of `lengths` (bits per symbol, 0 for symbols that
don't occur): shorter codes first, equal lengths by symbol. Eight bytes of zeros at least follow the last row, so that a
decoder may load whole words.

Length-limited codes: the Kraft sum of too long codes is mended by lengthening short ones (Moffat and Turpin 1997, "On the
implementation of minimum redundancy prefix codes"); within 1% of Huffman's on exponents of weights.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LAYOUT = "huffman-v1"
"""Name and version of the layout."""

NUM_SYMBOLS = 256
MAX_BITS = 12
"""Longest code: a table of 4,096 entries decodes it, 8 KiB, and four of them fit into one load of 64 bits."""

PADDING_BYTES = 8

_ENCODED_AT_ONCE = 2**20


def code_lengths(counts: torch.Tensor) -> torch.Tensor:
    """Bits per symbol, uint8 `(256,)`, of a prefix code that is short for these counts, int64 `(256,)`."""
    import torch

    lengths = torch.zeros(NUM_SYMBOLS, dtype=torch.uint8)
    heap: list[tuple[int, int, tuple[int, ...]]] = [
        (count, symbol, (symbol,)) for symbol, count in enumerate(counts.tolist()) if count
    ]
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
        return lengths
    heapq.heapify(heap)
    depth = dict.fromkeys((entry[1] for entry in heap), 0)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        together = first[2] + second[2]
        for symbol in together:
            depth[symbol] += 1
        heapq.heappush(heap, (first[0] + second[0], min(first[1], second[1]), together))
    for symbol, bits in _limited(depth, counts).items():
        lengths[symbol] = bits
    return lengths


def _limited(depth: dict[int, int], counts: torch.Tensor) -> dict[int, int]:
    """The same lengths where all are short enough; else the rarest symbols that can be are lengthened until codes exist."""
    lengths = {symbol: min(bits, MAX_BITS) for symbol, bits in depth.items()}
    room = (1 << MAX_BITS) - sum(1 << (MAX_BITS - bits) for bits in lengths.values())
    rarest_first = sorted(lengths, key=lambda symbol: (int(counts[symbol]), symbol))
    while room < 0:
        symbol = next(s for s in rarest_first if lengths[s] < MAX_BITS)
        room += 1 << (MAX_BITS - lengths[symbol] - 1)
        lengths[symbol] += 1
    for symbol in reversed(rarest_first):  # what is left over shortens the most frequent that it can
        while lengths[symbol] > 1 and room >= 1 << (MAX_BITS - lengths[symbol]):
            room -= 1 << (MAX_BITS - lengths[symbol])
            lengths[symbol] -= 1
    return lengths


def row_bytes(symbols: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Bytes of each row of `symbols` uint8 `(rows, columns)`, int64 `(rows,)`."""
    import torch

    bits = torch.stack([lengths[row.int()].sum(dtype=torch.int64) for row in symbols])
    return (bits + 7) // 8


def encode(symbols: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor, payload: torch.Tensor) -> None:
    """Write the codes of `symbols` uint8 `(rows, columns)` into `payload` uint8, zeros so far, at bytes `starts` `(rows,)`."""
    import torch

    codes, lengths = canonical_codes(lengths), lengths.int()
    step = max(1, _ENCODED_AT_ONCE // symbols.shape[1])
    for first in range(0, symbols.shape[0], step):
        part = symbols[first : first + step].int()
        bits = lengths[part]
        ends = bits.cumsum(1)
        place = ends - bits + 8 * starts[first : first + step, None]
        word = codes[part] << (24 - bits - (place & 7))  # three bytes, most significant first
        at = (place >> 3).flatten()
        for byte in range(3):  # codes don't overlap, so that sums are unions
            payload.index_add_(0, at + byte, (word >> (16 - 8 * byte) & 255).to(torch.uint8).flatten())


def canonical_codes(lengths: torch.Tensor) -> torch.Tensor:
    """The code of every symbol as a number, int32 `(256,)`."""
    import torch

    codes = torch.zeros(NUM_SYMBOLS, dtype=torch.int32)
    code, before = 0, 0
    for symbol in _in_order(lengths).tolist():
        bits = int(lengths[symbol])
        code <<= bits - before
        codes[symbol] = code
        code, before = code + 1, bits
    return codes


def decoding_table(lengths: torch.Tensor) -> torch.Tensor:
    """int16 `(4096,)`: for the next 12 bits, the symbol in the low byte and its code's length in the high one."""
    import torch

    symbols = _in_order(lengths)
    bits = lengths[symbols].int()
    entries = (symbols.int() | bits << 8).repeat_interleave(1 << (MAX_BITS - bits))
    table = torch.zeros(1 << MAX_BITS, dtype=torch.int16)
    table[: len(entries)] = entries
    return table


def _in_order(lengths: torch.Tensor) -> torch.Tensor:
    """Symbols that have a code, shorter ones first, int64."""
    import torch

    order = torch.argsort(lengths.int(), stable=True)
    return order[lengths[order] > 0]
