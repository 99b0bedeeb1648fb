"""torch's layouts hold the same values as ours, so that a comparison of speed compares like with like."""

import pytest
import torch
from packed_cases import error_of, make_case, make_input

from allocations import peak_bytes
from haversack.errors import UsageError
from haversack.kernels import registry
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


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(8, 0, True), (4, 64, True), (4, 128, False)])
@pytest.mark.parametrize(("num_tokens", "out_features"), [(1, 5), (40, 2000)])
def test_tiles_against_float64_within_the_declared_workspace(bits, group_size, symmetric, num_tokens, out_features):
    kernel = next(k for k in registry.kernels() if k.NAME.startswith(f"torch-int{bits}"))
    case = make_case(out_features, 1024, bits, group_size, symmetric)
    x = make_input(num_tokens, 1024, torch.bfloat16)
    assert kernel.supports(case.fmt, num_tokens, torch.bfloat16, 16)
    arguments = (x, case.codes, case.scales, case.zeros, case.fmt, 16)
    y = kernel.matmul(*arguments)
    declared = kernel.workspace_bytes(case.fmt, num_tokens, out_features, torch.bfloat16, 16)
    assert peak_bytes(lambda: kernel.matmul(*arguments)) - y.nbytes <= declared
    assert error_of(y, x, case) < 2**-7  # scales, results and what torch expands are rounded to bfloat16
    assert kernel.matmul(x[:0], case.codes, case.scales, case.zeros, case.fmt, 16).shape == (0, out_features)


def test_tiles_leave_to_others_what_torch_cannot_take():
    of = {bits: next(k for k in registry.kernels() if k.NAME.startswith(f"torch-int{bits}")) for bits in (4, 8)}
    for bits, group_size, in_features, dtype, activation_bits in (
        (8, 64, 1024, torch.bfloat16, 16), (4, 24, 1024, torch.bfloat16, 16), (4, 64, 1000, torch.bfloat16, 16),
        (4, 64, 1024, torch.float32, 16), (4, 64, 1024, torch.bfloat16, 8), (2, 64, 1024, torch.bfloat16, 16),
    ):  # fmt: skip
        fmt = make_case(16, in_features, bits, group_size, True).fmt
        assert not any(kernel.supports(fmt, 1, dtype, activation_bits) for kernel in of.values())


def test_what_torch_cannot_take_is_refused():
    codes, scales = torch.zeros(64, 256, dtype=torch.uint8), torch.ones(64, 2)
    with pytest.raises(UsageError, match="multiples of 16 rows"):
        pack_torch_int4(codes[:60], scales[:60], 128)
    with pytest.raises(UsageError, match="bfloat16 activations"):
        pack_torch_int4(codes, scales, 128).matmul(torch.zeros(1, 256))
