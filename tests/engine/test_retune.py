"""Scales and norms tuned together: less divergence, in the same bytes, and nothing else changed."""

import pytest
import torch
from tests.engine.tiny import load_whole, random_ids, save_tiny

from haversack.describe.assemble import read_site
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.model import describe_model
from haversack.engine.layers import matrix_view
from haversack.engine.retune import RetuneSettings, retune
from haversack.errors import UsageError
from haversack.parts.weights.base import WeightOption, WeightTask
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.hadamard import HadamardRotation
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.low_rank import LowRankCorrection
from haversack.parts.weights.nearest import NearestRounding
from haversack.parts.weights.sign_planes import SignPlanes

NEAREST = NearestRounding()
OPTIONS = (
    WeightOption(CodebookGrid("max2", 16, "u4"), NEAREST),
    WeightOption(IntegerGrid(2, 64, False), NEAREST),
    WeightOption(CodebookGrid("max2", 16), NEAREST, (HadamardRotation(),)),
    WeightOption(CodebookGrid("max3", 32), NEAREST, corrections=(LowRankCorrection(1),)),
    WeightOption(SignPlanes(2, 32), NEAREST),
)


def packed_by_turns(model):
    checkpoint = Checkpoint.open(model.folder)
    packed = {}
    for i, site in enumerate(model.weights):
        option = OPTIONS[i % len(OPTIONS)]
        packed[site.id] = (option, option.encode(WeightTask(read_site(checkpoint, site).float())))
    return packed


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "mixtral"])
def test_less_is_lost_in_the_same_bytes(family, tmp_path):
    torch.set_num_threads(1)
    folder = save_tiny(family, tmp_path / "model", "bfloat16")
    model, ids = describe_model(folder), random_ids(4, 24)
    packed = packed_by_turns(model)
    given = {id: {name: t.clone() for name, t in tensors.items()} for id, (_, tensors) in packed.items()}
    found = retune(model, packed, ids, ids, settings=RetuneSettings(epochs=12, batch_sequences=2, rate=0.01))
    assert found.after < 0.9 * found.before
    own, changed = {t.name: t for t in model.rest}, load_whole(folder, torch.float32)
    for site in model.weights:
        option, tensors = packed[site.id]
        new = found.tensors[site.id]
        assert {n: (t.dtype, t.shape) for n, t in new.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
        assert all(torch.equal(tensors[name], given[site.id][name]) for name in tensors)  # what was given stays
        moved = {name for name in new if not torch.equal(new[name], tensors[name])}
        assert moved <= {option.grid.float_scales}
        matrix = option.dense(new, site.out_features, site.in_features)
        matrix_view(changed.get_parameter(f"{site.module}.{site.parameter}"), site.module_slice).copy_(matrix)
    with torch.no_grad():
        for name, tensor in found.rest.items():
            assert tensor.dtype == torch.bfloat16 and tensor.shape == tuple(own[name].shape)
            changed.get_parameter(name).copy_(tensor)
        wanted = torch.log_softmax(load_whole(folder, torch.float32)(ids).logits, -1)
        lost = (wanted.exp() * (wanted - torch.log_softmax(changed(ids).logits, -1))).sum(-1).mean()
    assert float(lost) == pytest.approx(found.after, rel=1e-3)  # what is stored loses what was said


def test_what_does_not_help_is_not_kept(tmp_path):
    model, ids = describe_model(save_tiny("llama", tmp_path / "model")), random_ids(2, 16)
    packed = packed_by_turns(model)
    found = retune(model, packed, ids, ids, settings=RetuneSettings(epochs=0))
    assert found.before == found.after and found.rest == {}
    assert all(found.tensors[id][name] is t for id, (_, tensors) in packed.items() for name, t in tensors.items())


@pytest.mark.parametrize("field, value", [("epochs", -1), ("batch_sequences", 0), ("rate", 0.0)])
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(UsageError, match=f"{field} is {value}"):
        RetuneSettings(**{field: value})
