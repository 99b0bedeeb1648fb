"""What a plan promises from windows of easy and hard text."""

import pytest
import torch

from haversack.plan.refine import promised


def test_a_constant_share_of_the_entropy_spans_from_the_easiest_to_the_hardest_window():
    entropy = torch.tensor([1.0, 2.0, 4.0])[:, None].expand(3, 128)
    found = promised(0.01 * entropy, entropy)
    assert found.label == "measured"
    assert (found.low, found.nats, found.high) == pytest.approx((0.01, 0.07 / 3, 0.04))


def test_windows_that_disagree_widen_the_range_and_the_mean_stays_within():
    entropy = torch.full((4, 64), 2.0)
    share = torch.tensor([0.01, 0.02, 0.01, 0.02])[:, None]
    found = promised(share * entropy, entropy)
    assert found.nats == pytest.approx(0.03)
    assert found.low < 0.02 and found.high > 0.04
    lone = promised(torch.full((1, 64), 0.1), torch.full((1, 64), 2.0))
    assert lone.low == lone.nats == lone.high == pytest.approx(0.1)
