"""Second-level scales written out by compiled code, against float64 rounded once to float16."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haversack.codecs.scale_codings import SuperblockScales, scale_coding
from haversack.kernels.ir_superscales import SuperscaleCase
from haversack.kernels.superscales import expand, supported

pytestmark = pytest.mark.skipif(not supported(), reason="this CPU does not round to float16")


@given(
    st.sampled_from(["s4", "s6", "u4", "u6"]),
    st.sampled_from([16, 32, 64, 128]),
    st.integers(1, 150),
    st.integers(1, 140),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_scale_is_the_rounded_product(name, group_size, rows, groups):
    coding = scale_coding(name, group_size)
    assert isinstance(coding, SuperblockScales)
    generator = torch.Generator().manual_seed(groups)
    state = coding.encode(torch.randn(rows, groups, generator=generator).exp())
    stored = coding.pack(state)
    case = SuperscaleCase(coding.bits, coding.num_groups, coding.signed, groups)
    found = expand(stored["scales"], stored["superscales"], case)
    block = torch.arange(groups) // coding.num_groups
    expected = state["scales"].double() * state["superscales"].double()[:, block]
    assert found.dtype == torch.float16 and torch.equal(found, expected.half())
