"""Compiled rounding against the same recursion on numbers for which every float operation is exact."""

import pytest
import torch

from haversack.kernels.feedback import padded_rows, round_block
from haversack.kernels.scale_search import best_offers


def dyadic(shape, seed, *, bits, step):
    """Multiples of `step` below `2^(bits-1) * step`: products and sums of few of them are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator) * step


@pytest.mark.parametrize("num_codes", [4, 8, 16, 256])
@pytest.mark.parametrize(("columns", "out_features"), [(1, 3), (37, 64), (128, 130)])
def test_codes_and_changes_are_those_of_the_recursion(num_codes, columns, out_features):
    rows, groups = padded_rows(out_features), 2
    weight = dyadic((columns, rows), 0, bits=6, step=2.0**-5)
    target = weight + dyadic((columns, rows), 1, bits=3, step=2.0**-5)
    feedback = dyadic((columns, columns), 2, bits=4, step=2.0**-4)
    square = dyadic((columns,), 3, bits=3, step=0.5).abs()
    scale = torch.tensor([0.125, -0.25]).repeat_interleave(rows).view(groups, rows).clone()
    scale[0, 0] = 0
    zero = torch.full((groups, rows), num_codes / 2)
    group = torch.arange(columns) % groups
    error = torch.zeros(rows)
    codes, change = round_block(target, weight, feedback, square, group, scale, zero, error, num_codes)
    expected_error = torch.zeros(rows, dtype=torch.float64)
    expected = torch.zeros(columns, rows, dtype=torch.float64)
    for k in range(columns):
        wanted = target[k].double() - (feedback[k, :k].double()[:, None] * expected[:k]).sum(0)
        s, z = scale[group[k]].double(), zero[group[k]].double()
        code = (torch.where(s == 0, 0, wanted / s).round() + z).clamp(0, num_codes - 1)
        expected[k] = (code - z) * s - weight[k]
        expected_error += square[k] * ((code - z) * s - wanted) ** 2
        assert torch.equal(codes[k].double(), code)
        assert torch.equal(change[k].double(), expected[k])
    torch.testing.assert_close(error.double(), expected_error, rtol=1e-5, atol=1e-6)


def test_every_number_of_threads_gives_the_same():
    weight, scale = torch.randn(64, 1280), torch.rand(1, 1280) + 0.1
    feedback, square = torch.randn(64, 64) * 0.1, torch.rand(64)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        error = torch.zeros(1280)
        group = torch.zeros(64, dtype=torch.int64)
        codes, change = round_block(
            weight, weight, feedback, square, group, scale, torch.full_like(scale, 8), error, 16
        )
        found.append((codes, change, error))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("width", [9, 16, 32, 64, 128, 200])
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_the_first_best_offer_is_found_with_its_refit(rows, width):
    groups, offers, last = 3, 5, 15
    weight = dyadic((rows, groups, width), 0, bits=7, step=2.0**-5)
    importance = dyadic((groups, width), 1, bits=3, step=0.5).abs()
    scale = torch.tensor([0.5, 0.25, -0.25, 0.0, 0.25]).view(offers, 1, 1).expand(offers, rows, groups).contiguous()
    zero = torch.full_like(scale, 8.0)
    best, products, squares = best_offers(weight, importance, scale, zero, last + 1)
    inverse = torch.where(scale == 0, 0.0, 1 / scale)[..., None]
    q = ((weight * inverse).round() + 8).clamp(0, last) - 8
    errors = ((q * scale[..., None] - weight).double().square() * importance).sum(-1)
    assert torch.equal(best, errors.argmin(0))
    assert len(best.unique()) > 1 or rows == 1 or width < 64
    taken = q.gather(0, best[None, ..., None].expand(1, rows, groups, width))[0]
    assert torch.equal(products, (importance * taken * weight).sum(-1))
    assert torch.equal(squares, (importance * taken * taken).sum(-1))


@pytest.mark.parametrize("width", [16, 32, 128])
def test_offers_to_a_table_are_weighed_by_its_values(width):
    """Values that no rounding touches, so that sums are exact; halfway between two, the lower one is taken."""
    table, offers = (-2.0, -0.5, 0.5, 2.0), 4
    weight = dyadic((5, 3, width), 0, bits=7, step=2.0**-5)
    importance = dyadic((3, width), 1, bits=3, step=0.5).abs()
    scale = torch.tensor([0.5, 0.25, -0.25, 0.0]).view(offers, 1, 1).expand(offers, 5, 3).contiguous()
    best, products, squares = best_offers(weight, importance, scale, scale, 4, table)
    inverse = torch.where(scale == 0, 0.0, 1 / scale)[..., None]
    borders, values = torch.tensor([-1.25, 0.0, 1.25]), torch.tensor(table)
    q = values[torch.searchsorted(borders, weight * inverse)]
    errors = ((q * scale[..., None] - weight).double().square() * importance).sum(-1)
    assert torch.equal(best, errors.argmin(0))
    taken = q.gather(0, best[None, ..., None].expand(1, 5, 3, width))[0]
    assert torch.equal(products, (importance * taken * weight).sum(-1))
    assert torch.equal(squares, (importance * taken * taken).sum(-1))
