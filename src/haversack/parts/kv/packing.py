"""Asymmetric codes with a float16 scale and zero, packed by planes along channels: what packed caches have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SMALLEST_SCALE = 2.0**-24
"""The smallest float16 above zero: a constant group has no range, and must not divide by it."""


def num_channel_groups(num_channels: int, group_size: int) -> int:
    return -(-num_channels // group_size)


def channel_groups(num_channels: int, group_size: int) -> list[slice]:
    return [slice(c, min(c + group_size, num_channels)) for c in range(0, num_channels, group_size)]


def row_bytes(num_channels: int, bits: int) -> int:
    if bits == 3:
        return row_bytes(num_channels, 2) + row_bytes(num_channels, 1)
    return -(-num_channels * bits // 8)


def quantize(x: torch.Tensor, bits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (uint8, the shape of x), and scale and zero (float16, one along `dim`) with x near codes * scale + zero."""
    import torch

    largest = torch.finfo(torch.float16).max
    low, high = torch.aminmax(x, dim=dim, keepdim=True)
    levels = 2**bits - 1
    zero = low.clamp(-largest, largest).to(torch.float16)
    # the scale must reach from the rounded zero, not from the true minimum, to the maximum
    scale = ((high - zero.float()) / levels).clamp(SMALLEST_SCALE, largest).to(torch.float16)
    codes = ((x - zero.float()) / scale.float()).round_().clamp_(0, levels).to(torch.uint8)
    return codes, scale, zero


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`(..., channels)` codes to `(..., row_bytes)`, by planes; of 3 bits the third lie behind the first two."""
    if bits == 8:
        return codes
    import torch

    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], -1)

    num_channels = codes.shape[-1]
    num_bytes = row_bytes(num_channels, bits)
    packed = torch.zeros((*codes.shape[:-1], num_bytes), dtype=torch.uint8, device=codes.device)
    for plane in range(8 // bits):
        part = codes[..., plane * num_bytes : (plane + 1) * num_bytes]
        packed[..., : part.shape[-1]] |= part << (plane * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int, num_channels: int) -> torch.Tensor:
    """`(..., row_bytes)` to codes `(..., channels)` in float32."""
    import torch

    if bits == 8:
        return packed.to(torch.float32)
    if bits == 3:
        low = row_bytes(num_channels, 2)
        return unpack(packed[..., :low], 2, num_channels).add_(unpack(packed[..., low:], 1, num_channels), alpha=4)
    num_bytes = packed.shape[-1]
    codes = torch.empty((*packed.shape[:-1], num_channels), dtype=torch.float32, device=packed.device)
    for plane in range(8 // bits):
        channels = slice(plane * num_bytes, min((plane + 1) * num_bytes, num_channels))
        width = channels.stop - channels.start
        if width > 0:
            codes[..., channels] = (packed[..., :width] >> (plane * bits)).bitwise_and_(2**bits - 1)
    return codes
