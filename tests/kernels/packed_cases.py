"""Random packed matrices and their float64 reference, shared by the kernel tests."""

from dataclasses import dataclass

import torch

from haversack.codecs.bitpack import pack_codes
from haversack.kernels.format import PackedFormat


@dataclass
class PackedCase:
    fmt: PackedFormat
    weight: torch.Tensor  # float64 (out, in): the values the codes stand for
    magnitude: torch.Tensor  # float64 (out, in): (2^(bits-1) + |zero - centre|) * scale, half the grid's range
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    @property
    def arguments(self) -> dict[str, object]:
        fmt = self.fmt
        return {"bits": fmt.bits, "group_size": fmt.group_size, "in_features": fmt.in_features, "table": fmt.table}


def make_case(
    out_features: int, in_features: int, bits: int, group_size: int, symmetric: bool, seed: int = 0
) -> PackedCase:
    """Codes over the whole range, scales over four octaves, zero points over the whole range of codes."""
    generator = torch.Generator().manual_seed(seed)
    fmt = PackedFormat(bits, group_size, in_features, symmetric)
    groups = (out_features, fmt.num_groups)
    codes = torch.randint(0, 1 << bits, (out_features, fmt.padded_columns), generator=generator, dtype=torch.uint8)
    scales = (2.0 ** (-6 + 4 * torch.rand(groups, generator=generator))).half()
    zeros = None if symmetric else torch.randint(0, 1 << bits, groups, generator=generator, dtype=torch.uint8)
    zero = torch.full(groups, 1 << (bits - 1)) if zeros is None else zeros
    values = codes.double().view(*groups, -1) - zero.double()[..., None]
    centre = 1 << (bits - 1)
    sizes = (centre + (zero.double()[..., None] - centre).abs()).expand_as(values)
    weight = (values * scales.double()[..., None]).view(out_features, -1)[:, :in_features]
    magnitude = (sizes * scales.double()[..., None]).reshape(out_features, -1)[:, :in_features]
    return PackedCase(fmt, weight, magnitude, pack_codes(codes, bits), scales, zeros)


def make_table_case(
    out_features: int, in_features: int, bits: int, group_size: int, scales: str, exact: bool, seed: int = 0
) -> PackedCase:
    """Codes into a random table, of float32 or (`exact`) bfloat16 numbers; scales as floats or exponents over four
    octaves, a tenth of them 0."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(1 << bits, generator=generator)
    table = table.bfloat16().float() if exact else table
    fmt = PackedFormat(bits, group_size, in_features, True, tuple(table.tolist()), scales)
    groups = (out_features, fmt.num_groups)
    codes = torch.randint(0, 1 << bits, (out_features, fmt.padded_columns), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(120, 125, groups, generator=generator)
    exponents[torch.rand(groups, generator=generator) < 0.1] = 0
    values = torch.where(exponents == 0, 0.0, 2.0 ** (exponents.double() - 127))
    weight = table.double()[codes.long()].view(*groups, -1) * values[..., None]
    magnitude = table.double().abs().max() * values[..., None].expand_as(weight)
    weight, magnitude = (t.reshape(out_features, -1)[:, :in_features] for t in (weight, magnitude))
    stored = values.half() if scales == "f16" else exponents.to(torch.uint8)
    return PackedCase(fmt, weight, magnitude, pack_codes(codes, bits), stored, None)


def make_input(num_tokens: int, in_features: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, in_features, generator=generator).to(dtype)


def error_of(y: torch.Tensor, x: torch.Tensor, case: PackedCase) -> float:
    """Largest |y - x W^T|, in parts of sum |x| times half the grid's range."""
    if not y.numel():
        return 0.0
    bound = x.double().abs() @ case.magnitude.t() + 1e-30
    return ((y.double() - x.double() @ case.weight.t()).abs() / bound).max().item()
