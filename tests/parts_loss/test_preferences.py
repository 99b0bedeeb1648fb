"""Losses over pairs of answers: the papers' formulas, by hand; gradients that raise the chosen answer."""

from __future__ import annotations

import math

import pytest
import torch

from haversack.errors import UsageError
from haversack.parts.base import part_from_dict
from haversack.parts.loss.length_margin import LengthMargin
from haversack.parts.loss.reference_margin import ReferenceMargin
from haversack.recipes.base import preference, preferences

FOUND = torch.tensor([[-6.0, -9.0], [-20.0, -5.0]])
BEFORE = torch.tensor([[-8.0, -8.0], [-21.0, -4.0]])
TOKENS = torch.tensor([[3.0, 3.0], [10.0, 2.0]])


def test_the_margin_over_the_reference() -> None:
    losses, margins = ReferenceMargin(beta=0.5).pair_losses(FOUND, TOKENS, BEFORE)
    assert margins.tolist() == [0.5 * (2 + 1), 0.5 * (1 + 1)]
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-1.5)), math.log1p(math.exp(-1.0))])
    same, none = ReferenceMargin().pair_losses(BEFORE, TOKENS, BEFORE)
    assert none.tolist() == [0.0, 0.0] and same.tolist() == pytest.approx([math.log(2)] * 2)


def test_the_margin_per_token() -> None:
    losses, margins = LengthMargin(beta=2.0, gamma=1.0, likelihood=0.1).pair_losses(FOUND, TOKENS, None)
    assert margins.tolist() == pytest.approx([2 * (-2 + 3), 2 * (-2 + 2.5)])
    expected = [math.log1p(math.exp(1 - 2)) + 0.2, math.log1p(math.exp(1 - 1)) + 0.2]
    assert losses.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", list(preferences()))
def test_the_chosen_answer_is_raised_and_the_rejected_one_lowered(name: str) -> None:
    part = preference(name)
    assert part is not None and part_from_dict(part.to_dict()) == part
    found = FOUND.clone().requires_grad_()
    part.pair_losses(found, TOKENS, BEFORE if part.uses_reference else None)[0].sum().backward()
    assert found.grad is not None
    assert bool((found.grad[:, 0] < 0).all()) and bool((found.grad[:, 1] > 0).all())


def test_bad_fields_and_names_are_refused() -> None:
    with pytest.raises(UsageError, match="beta is 0, but must be above 0"):
        ReferenceMargin(beta=0)
    with pytest.raises(UsageError, match="gamma is -1"):
        LengthMargin(gamma=-1)
    with pytest.raises(UsageError, match="'ppo', but must be one of likelihood, dpo, logo"):
        preference("ppo")
    assert preference("likelihood") is None
