"""Families as they were published: the parameters found from a config alone are the published ones, to the last."""

from __future__ import annotations

import pytest
from tests.describe.published import PUBLISHED

from haversack.describe.model import describe_model


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_the_published_total(name: str) -> None:
    config, num_parameters = PUBLISHED[name]
    model = describe_model(config)
    assert model.num_parameters == num_parameters
    assert len(model.attention) == model.num_layers
    packable = sum(site.num_parameters for site in model.weights)
    vision = sum(t.num_bytes for t in model.rest if "vision" in t.name) // 2
    assert packable + vision > 0.999 * num_parameters  # only norms, biases and routers stay as they are
