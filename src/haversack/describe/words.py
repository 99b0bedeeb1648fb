"""Codes packed without gaps into 32-bit words: code i takes bits `bits * i ... bits * i + bits - 1`, the lowest first.

GPTQ's layout and compressed-tensors' agree in this, for any number of bits from 1 to 8 (a code of 3 bits may lie in two
words). Words are int32, little-endian, as safetensors hold them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WORD_BITS = 32
MAX_BITS = 8


def num_words(num_codes: int, bits: int) -> int:
    """Words that so many codes take."""
    return -(-num_codes * bits // WORD_BITS)


def unpack_words(words: torch.Tensor, bits: int, num_codes: int) -> torch.Tensor:
    """Codes, uint8 `(..., num_codes)`, of int32 words `(..., num_words(num_codes, bits))`.

    Allocates up to 3 bytes per code where `bits` divides 8, and 25 otherwise.
    """
    import torch
    import torch.nn.functional as F

    if MAX_BITS % bits == 0:
        shifts = torch.arange(0, MAX_BITS, bits, dtype=torch.uint8)
        codes = words.contiguous().view(torch.uint8).unsqueeze(-1) >> shifts  # (..., bytes, codes per byte)
        return codes.bitwise_and_((1 << bits) - 1).flatten(-2)[..., :num_codes]
    # A run of 32 codes is `bits` whole words. One word more, so that the last code has a next word to look at.
    words = F.pad(words, (0, -words.shape[-1] % bits)).unflatten(-1, (-1, bits)).long().bitwise_and_(2**WORD_BITS - 1)
    starts = torch.arange(WORD_BITS) * bits
    pairs = F.pad(words, (0, 1))
    word, shift = starts // WORD_BITS, starts % WORD_BITS
    both = pairs[..., word] | pairs[..., word + 1] << WORD_BITS
    return (both >> shift).bitwise_and_((1 << bits) - 1).to(torch.uint8).flatten(-2)[..., :num_codes]


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words `(..., num_words)` of uint8 codes `(..., num_codes)` below `2 ** bits`; the inverse of `unpack_words`."""
    import torch
    import torch.nn.functional as F

    count = num_words(codes.shape[-1], bits)
    runs = F.pad(codes, (0, -codes.shape[-1] % WORD_BITS)).unflatten(-1, (-1, WORD_BITS)).long()
    starts = torch.arange(WORD_BITS) * bits
    shifted = runs << starts % WORD_BITS
    words = torch.zeros(*runs.shape[:-1], bits + 1, dtype=torch.int64)
    words.index_add_(-1, starts // WORD_BITS, shifted & 2**WORD_BITS - 1)
    words.index_add_(-1, starts // WORD_BITS + 1, shifted >> WORD_BITS)
    words = words[..., :bits].flatten(-2)[..., :count]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
