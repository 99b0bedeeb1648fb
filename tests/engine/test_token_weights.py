"""Tokens weighed by the attention they get, against transformers' own attention matrices."""

import pytest
import torch
from tests.engine.tiny import load_whole, random_ids, save_tiny

from haversack.engine.calibrate import calibrate
from haversack.engine.layers import StreamedModel
from haversack.engine.token_weights import LEAST_WEIGHT, collect_attended
from haversack.errors import UsageError
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.parts.weights.token_weighting import TokenWeighting

WEIGHTED = WeightOption(IntegerGrid(4, 64), NearestRounding(), (TokenWeighting(),))


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_moments_are_those_of_tokens_scaled_by_their_share_of_attention(family, tmp_path):
    folder = save_tiny(family, tmp_path / "model")
    ids = random_ids(3, 40)
    statistics = calibrate(folder, ids, cache=tmp_path / "cache")
    site = next(
        s for s in StreamedModel.open(folder).described.weights if s.layer == 1 and s.role in ("down", "output")
    )
    weight = torch.randn(site.out_features, site.in_features)
    with pytest.raises(UsageError, match="weighed by attention"):
        WEIGHTED.encode(statistics[site.id].task(weight))
    collect_attended(StreamedModel.open(folder), ids, statistics.folder, batch_tokens=80)

    whole, inputs = load_whole(folder, torch.float32, "eager"), []
    whole.get_submodule(site.module).register_forward_hook(lambda m, x, y: inputs.append(x[0]))
    with torch.no_grad():
        attentions = whole(ids, output_attentions=True).attentions[1]
    received = attentions.sum((1, 2))
    low, high = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
    x = (inputs[0] * (LEAST_WEIGHT + (1 - LEAST_WEIGHT) * (received - low) / (high - low))[..., None]).flatten(0, 1)
    found = statistics[site.id]
    assert torch.allclose(found.attended, x.T @ x / len(x), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(found.attended, found.hessian, rtol=0.2)
    task = found.task(weight)
    WEIGHTED.encode(task)
    assert torch.equal(task.hessian, found.attended)


def test_what_lies_in_no_layer_counts_all_tokens_alike(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    statistics = calibrate(folder, random_ids(2, 20), cache=tmp_path / "cache")
    collect_attended(StreamedModel.open(folder), random_ids(2, 20), statistics.folder)
    outside = [s.id for s in StreamedModel.open(folder).described.weights if s.layer is None]
    assert outside and all(torch.equal(statistics[id].attended, statistics[id].hessian) for id in outside)
