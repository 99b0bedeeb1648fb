import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allocations import peak_bytes
from haversack.codecs.bitplanes import UNPACK_BYTES_PER_CODE, block_bytes, pack_planes, unpack_rows
from haversack.errors import UsageError


@given(st.integers(1, 8), st.integers(0, 40), st.integers(1, 200), st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_planes_hold_every_code(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = pack_planes(codes, bits)
    assert packed.shape == (-(-rows // 16), block_bytes(columns, bits)) and packed.is_contiguous()
    index = torch.randperm(rows, generator=generator)
    assert torch.equal(unpack_rows(packed, index, bits, columns), codes[index])


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_are_bits_times_elements(bits):
    assert 2 * block_bytes(96, bits) == bits * 32 * 96 // 8


def test_the_layout_is_as_documented():
    """Bit k of word r of plane p of unit u of block b is bit p of the code at row 16 b + r, column 32 u + k."""
    codes = torch.randint(0, 8, (40, 100), dtype=torch.uint8)
    words = pack_planes(codes, 3).view(torch.int32).view(3, 4, 3, 16)  # (blocks, units, planes, rows)
    for row, column, plane in [(0, 0, 0), (17, 33, 2), (39, 99, 1), (15, 31, 2), (32, 64, 0)]:
        word = int(words[row // 16, column // 32, plane, row % 16])
        assert word >> column % 32 & 1 == int(codes[row, column]) >> plane & 1


def test_unpacking_allocates_no_more_than_it_says():
    packed = pack_planes(torch.randint(0, 256, (512, 512), dtype=torch.uint8), 8)
    index = torch.arange(512)
    peak = peak_bytes(lambda: unpack_rows(packed, index, 8, 512))
    # The rows' own planes are copied first: as many bytes as they take packed.
    assert peak <= 512 * 512 * UNPACK_BYTES_PER_CODE + packed.nbytes + 3 * 8 * 512


def test_codes_and_bytes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="code 4 does not fit in 2 bits"):
        pack_planes(torch.tensor([[4]], dtype=torch.uint8), 2)
    with pytest.raises(UsageError, match="1 to 8"):
        pack_planes(torch.zeros(1, 1, dtype=torch.uint8), 9)
    with pytest.raises(UsageError, match="must be uint8"):
        pack_planes(torch.zeros(1, 1), 1)
    with pytest.raises(UsageError, match=r"\(blocks, 64\)"):
        unpack_rows(torch.zeros(1, 60, dtype=torch.uint8), torch.tensor([0]), 1, 32)
