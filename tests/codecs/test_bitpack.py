import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haversack.codecs.bitpack import PACKED_BITS, pack_codes, packed_row_bytes, unpack_codes
from haversack.errors import UsageError


@st.composite
def code_matrices(draw):
    bits = draw(st.sampled_from(PACKED_BITS))
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(1, 400))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return bits, torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


@given(code_matrices())
@settings(max_examples=60, deadline=None)
def test_unpacking_inverts_packing_and_takes_the_declared_bytes(case):
    bits, codes = case
    packed = pack_codes(codes, bits)
    assert packed.is_contiguous() and packed.shape == (codes.shape[0], packed_row_bytes(codes.shape[1], bits))
    assert torch.equal(unpack_codes(packed, bits, codes.shape[1]), codes)


@given(code_matrices(), st.integers(0, 399))
@settings(max_examples=40, deadline=None)
def test_a_code_lies_where_the_layout_says(case, column):
    """Read one code by the formula of the layout, without `unpack_codes`: files must stay readable."""
    bits, codes = case
    if not codes.shape[0]:
        return
    column %= codes.shape[1]
    packed = pack_codes(codes, bits)[-1].tolist()

    def read(first_byte: int, width: int) -> int:
        unit, inside = divmod(column, 64)
        plane, j = divmod(inside, 8 * width)
        return (packed[first_byte + unit * 8 * width + j] >> (plane * width)) & ((1 << width) - 1)

    if bits == 3:
        value = read(0, 2) | read(packed_row_bytes(codes.shape[1], 2), 1) << 2
    else:
        value = read(0, bits)
    assert value == codes[-1, column]


def test_whole_units_have_no_padding():
    for bits in PACKED_BITS:
        assert packed_row_bytes(4096, bits) * 8 == 4096 * bits
        assert packed_row_bytes(1, bits) == packed_row_bytes(64, bits) == 8 * bits


@pytest.mark.parametrize("bits", [0, 1, 5, 16])
def test_other_widths_are_refused(bits):
    with pytest.raises(UsageError, match=f"{bits} bits"):
        packed_row_bytes(64, bits)


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="code 4 does not fit in 2 bits"):
        pack_codes(torch.full((1, 3), 4, dtype=torch.uint8), 2)
    with pytest.raises(UsageError, match="uint8"):
        pack_codes(torch.zeros(1, 3), 4)
    with pytest.raises(UsageError, match=r"\(rows, 32\)"):
        unpack_codes(torch.zeros(1, 31, dtype=torch.uint8), 4, 64)
