"""torch's layouts hold the same values as ours, so that a comparison of speed compares like with like."""

import pytest
import torch

from haversack.errors import UsageError
from haversack.kernels.torch_packed import pack_torch_int4, pack_torch_int8


def test_torch_int4_and_int8_compute_the_same_product():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 256, generator=generator).bfloat16()
    for bits, group_size in ((4, 128), (8, 256)):
        codes = torch.randint(0, 1 << bits, (64, 256), generator=generator, dtype=torch.uint8)
        scales = torch.rand(64, 256 // group_size, generator=generator).bfloat16().float() / 64
        groups = (codes.double() - (1 << (bits - 1))).view(64, -1, group_size)
        weight = (groups * scales.bfloat16().double()[..., None]).view(64, 256)
        packed = pack_torch_int4(codes, scales, group_size) if bits == 4 else pack_torch_int8(codes, scales)
        error = (packed.matmul(x).double() - x.double() @ weight.t()).abs()
        # One rounding of the result, and of the weights where torch expands them, both to bfloat16.
        assert (error <= 2**-7 * (x.double().abs() @ weight.abs().t())).all()
        assert packed.layout.startswith(f"torch-int{bits}")


def test_what_torch_cannot_take_is_refused():
    codes, scales = torch.zeros(64, 256, dtype=torch.uint8), torch.ones(64, 2)
    with pytest.raises(UsageError, match="multiples of 16 rows"):
        pack_torch_int4(codes[:60], scales[:60], 128)
    with pytest.raises(UsageError, match="bfloat16 activations"):
        pack_torch_int4(codes, scales, 128).matmul(torch.zeros(1, 256))
