"""What a kernel of decode-time attention is made for, and how the tokens that it reads lie."""

from __future__ import annotations

from dataclasses import dataclass

from haversack.kernels.ir_float import converts_half, float_bytes
from haversack.kernels.ir_packed_tokens import ChunkForm
from haversack.kernels.llvm import Target

PLAIN_BLOCK_TOKENS = 64
"""Tokens between two rescalings where keys and values lie in floats."""

MAX_ROWS = 8
"""Query rows of a KV head that are taken together: as many as leave registers for keys."""

TENSORS = ("key_codes", "key_scales", "key_zeros", "value_codes", "value_scales", "value_zeros")


@dataclass(frozen=True)
class AttentionCase:
    """One kernel: `rows` query rows share a KV head at a time, of `row_rounds` times as many.

    `dtype` ("float32", "bfloat16", "float16") is that of queries, new tokens, slabs and output. With bits, tokens that
    left the ring are packed in layout `kv-tokens-v1`: a token's row in planes, with float16 scales and zeros per channel
    and `group_size` tokens for keys, per token and `group_size` channels for values.
    """

    rows: int
    row_rounds: int
    key_head_dim: int
    value_head_dim: int
    dtype: str
    key_bits: int
    value_bits: int
    group_size: int
    softcap: float | None
    target: Target

    @property
    def is_packed(self) -> bool:
        return self.key_bits > 0

    @property
    def value_groups(self) -> int:
        """Groups of channels with a scale of their own."""
        return -(-self.value_head_dim // self.group_size)

    @property
    def key_chunks(self) -> ChunkForm | None:
        """How packed keys are read sixty-four bytes at a time; None where a token's row is read piece by piece."""
        form = ChunkForm(self.key_bits, self.key_head_dim, self.group_size)
        return form if form.is_supported(self.target) else None

    @property
    def value_chunks(self) -> ChunkForm | None:
        """The same for packed values."""
        form = ChunkForm(self.value_bits, self.value_head_dim, self.group_size)
        return form if form.is_supported(self.target) else None

    @property
    def state_bytes(self) -> int:
        """What a unit leaves: a maximum and a sum per row, in eight lanes each, and the rows' outputs."""
        return 64 + 4 * self.rows * self.value_head_dim


@dataclass(frozen=True)
class TokenBlock:
    """How the tokens of one block lie: "float32", "bfloat16", "float16" or bits, and how many at most."""

    key: str
    value: str
    tokens: int
    value_groups: int


def supports(
    key_head_dim: int, value_head_dim: int, dtype: str, key_bits: int, value_bits: int, group_size: int, target: Target
) -> bool:
    """Rows of whole vectors of sixteen, in every plane; float16 where the CPU converts it."""

    def whole(channels: int, bits: int) -> bool:
        return channels % (16 * 8 // bits if bits else 16) == 0

    converts = dtype != "float16" or converts_half(target)
    return (
        dtype in ("float32", "bfloat16", "float16")
        and converts
        and (key_bits > 0) == (value_bits > 0)
        and group_size % 16 == 0
        and whole(key_head_dim, key_bits)
        and whole(value_head_dim, value_bits)
    )


def row_bytes_of(form: str, channels: int) -> int:
    return channels * int(form) // 8 if form.isdigit() else channels * float_bytes(form)
