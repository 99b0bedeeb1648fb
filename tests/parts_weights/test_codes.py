"""Codes that lose nothing: every bit comes back, in the bytes that were declared, and the plain-Python decoder agrees."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.parts_weights.test_weight_options import DTYPE_NAMES, peak_bytes

from haversack.codecs import huffman
from haversack.errors import CheckpointError, UsageError
from haversack.kernels.bf16_decode import decode_rows
from haversack.ledger import StoredTensor
from haversack.parts.weights import entropy_coded
from haversack.parts.weights.base import WeightOption, WeightTask
from haversack.parts.weights.entropy_coded import EntropyCodedFloat
from haversack.parts.weights.integer import IntegerGrid

ROOM = WeightOption(code=EntropyCodedFloat(8.0))


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05).bfloat16()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype == torch.bfloat16 and torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 64), (66, 130), (4, 1)])
def test_every_bit_comes_back_in_the_declared_bytes(shape):
    weight = weights(*shape)
    weight[0, 0] = -0.0
    tensors = ROOM.encode(WeightTask(weight.float()))
    created = {StoredTensor(k, DTYPE_NAMES.get(t.dtype, "I32"), tuple(t.shape)) for k, t in tensors.items()}
    assert created == set(ROOM.stored(*shape, "BF16"))
    assert sum(t.untyped_storage().nbytes() for t in tensors.values()) == ROOM.stored_bytes(*shape, "BF16")
    assert same_bits(ROOM.dense(tensors, *shape), weight)
    index = torch.tensor([shape[0] - 1, 0, shape[0] - 1])
    assert same_bits(ROOM.rows(index, tensors, shape[1]), weight[index])
    assert ROOM.lossless and not ROOM.is_neutral
    assert WeightOption.from_dict(json.loads(json.dumps(ROOM.to_dict()))) == ROOM


def test_any_bits_at_all_come_back():
    """Zeros, subnormals, infinities and not-a-numbers too: all 65,536."""
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(256, 256)
    tensors = WeightOption(code=EntropyCodedFloat(8.0)).code.encode(WeightTask(weight))
    assert same_bits(ROOM.dense(tensors, 256, 256), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 3, 70])
def test_products_are_torchs_own_to_the_bit(dtype, num_tokens, monkeypatch):
    weight = weights(300, 192)
    tensors = ROOM.encode(WeightTask(weight.float()))
    x = torch.randn(2, num_tokens, 192, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = F.linear(x.view(-1, 192), weight.to(dtype)).view(2, num_tokens, 300)
    assert torch.equal(ROOM.linear(x, tensors, 300), expected)
    monkeypatch.setattr(entropy_coded, "TILE_BYTES", 128 * 192 * 2)  # three tiles
    assert torch.equal(ROOM.linear(x, tensors, 300), expected)


@pytest.mark.parametrize("tile_bytes", [32 << 20, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_stay_within_the_declared_workspace(dtype, tile_bytes, monkeypatch):
    monkeypatch.setattr(entropy_coded, "TILE_BYTES", tile_bytes)
    weight = weights(3000, 512)
    tensors = ROOM.encode(WeightTask(weight.float()))
    for num_tokens in (1, 3, 200):
        x = torch.randn(num_tokens, 512).to(dtype)
        ROOM.linear(x, tensors, 3000)
        own = peak_bytes(lambda x=x: torch.nn.functional.linear(x, weight.to(dtype))) - weight.numel() * (
            4 if dtype == torch.float32 else 0
        )
        peak = peak_bytes(lambda x=x: ROOM.linear(x, tensors, 3000)) - max(own, num_tokens * 3000 * dtype.itemsize)
        assert 0 < peak <= ROOM.workspace_bytes(num_tokens, 3000, 512, DTYPE_NAMES[dtype])
    if tile_bytes < 32 << 20:
        assert peak < 3000 * 512 * dtype.itemsize  # the whole matrix as torch would want it


def test_a_matrix_takes_the_room_it_needs():
    """Normal weights need 2.6 bits for their exponents; what holds says is what encoding does, to the eighth of a bit."""
    weight = weights(64, 2048)
    assert 2.4 < EntropyCodedFloat().needed_bits(weight) < 2.7
    for eighths in range(8, 40):
        code = EntropyCodedFloat(eighths / 8)
        if code.holds(weight):
            code.encode(WeightTask(weight.float()))
    with pytest.raises(CheckpointError, match=r"room was set aside for 2 .*set more aside"):
        EntropyCodedFloat(2.0).encode(WeightTask(weight.float()))


def test_what_it_cannot_hold_is_refused():
    with pytest.raises(CheckpointError, match="not bfloat16"):
        EntropyCodedFloat().encode(WeightTask(torch.randn(4, 64)))
    for bad in (0.5, 9, True):
        with pytest.raises(UsageError, match="exponent_bits"):
            EntropyCodedFloat(bad)
    with pytest.raises(UsageError, match="no other part"):
        WeightOption(grid=IntegerGrid(), code=EntropyCodedFloat())


@settings(max_examples=80, deadline=None)
@given(counts=st.lists(st.integers(0, 10**9), min_size=1, max_size=256), seed=st.integers(0, 2**31 - 1))
def test_codes_are_short_prefix_free_and_decoded_by_hand(counts, seed):
    counts = torch.tensor(counts + [0] * (256 - len(counts)))
    counts[seed % 256] += 1
    lengths = huffman.code_lengths(counts)
    used = counts > 0
    assert torch.equal(lengths > 0, used) and int(lengths.max()) <= huffman.MAX_BITS
    assert float((2.0 ** -lengths[used].double()).sum()) <= 1
    share = counts[used].double() / counts.sum()
    entropy = float(-(share * share.log2()).sum())
    assert (
        float((share * lengths[used]).sum()) <= entropy + 1.1
    )  # Huffman's own bound is 1; the limit to 12 bits adds to it
    symbols = torch.nonzero(used)[:, 0][torch.randint(int(used.sum()), (3, 50))].to(torch.uint8)
    sizes = huffman.row_bytes(symbols, lengths)
    starts = sizes.cumsum(0) - sizes
    payload = torch.zeros(int(sizes.sum()) + huffman.PADDING_BYTES, dtype=torch.uint8)
    huffman.encode(symbols, lengths, starts, payload)
    by_code = {
        (int(bits), int(code)): symbol
        for symbol, (bits, code) in enumerate(zip(lengths, huffman.canonical_codes(lengths), strict=True))
        if bits
    }
    for row, start in zip(symbols.tolist(), starts.tolist(), strict=True):
        stream = iter("".join(f"{byte:08b}" for byte in payload[start:].tolist()))
        for symbol in row:
            code = next(stream)
            while (len(code), int(code, 2)) not in by_code:
                code += next(stream)
            assert by_code[len(code), int(code, 2)] == symbol
    out, rest = torch.empty(3, 50, dtype=torch.bfloat16), torch.zeros(3, 50, dtype=torch.uint8)
    decode_rows(out, torch.arange(3), payload, starts.to(torch.int32), rest, lengths)
    assert torch.equal(out.view(torch.int16) >> 7, symbols.to(torch.int16))
