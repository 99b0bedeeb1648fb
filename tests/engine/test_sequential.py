"""The sequential pass: statistics of inputs as the layers before have made them."""

import pytest
import torch
from tests.engine.tiny import load_whole, random_ids, save_tiny

from haversack.engine.calibrate import calibrate
from haversack.engine.layers import StreamedModel, matrix_view
from haversack.engine.sequential import sequential_layers


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("within_layer", [True, False])
def test_without_changes_it_sees_what_calibration_sees(family, within_layer, tmp_path):
    folder = save_tiny(family, tmp_path / "model")
    ids = random_ids(4, 24)
    statistics = calibrate(folder, ids, cache=tmp_path / "cache")
    model = StreamedModel.open(folder)
    seen = []
    for visit in sequential_layers(model, ids, scratch=tmp_path / "s", within_layer=within_layer, batch_tokens=48):
        for site in visit.sites:
            assert torch.allclose(visit.hessians[site.id], statistics[site.id].hessian, rtol=1e-3, atol=1e-6)
            seen.append(site.id)
    assert sorted(seen) == sorted(site.id for site in model.described.weights if site.layer is not None)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("within_layer", [True, False])
def test_changes_shape_later_inputs(within_layer, tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    ids = random_ids(3, 20)
    model = StreamedModel.open(folder)
    changed = load_whole(folder, torch.float32)
    checked = 0
    for visit in sequential_layers(model, ids, scratch=tmp_path / "s", within_layer=within_layer):
        inputs = {}
        hooks = [
            changed.get_submodule(site.module).register_forward_hook(
                lambda m, x, y, site=site, inputs=inputs: inputs.__setitem__(site.id, x[0].flatten(0, -2))
            )
            for site in visit.sites
        ]
        with torch.no_grad():
            changed(ids)
        for hook in hooks:
            hook.remove()
        for site in visit.sites:
            x = inputs[site.id]
            assert torch.allclose(visit.hessians[site.id], x.T @ x / len(x), rtol=1e-3, atol=1e-6), site.id
            checked += 1
        for site in visit.sites:
            weight = visit.weight(site) * 0.5
            visit.replace(site, weight)
            matrix_view(changed.get_parameter(f"{site.module}.{site.parameter}"), site.module_slice).copy_(weight)
    assert checked == 14


def test_a_killed_pass_goes_on_at_its_layer(tmp_path):
    folder = save_tiny("llama", tmp_path / "model", num_layers=3)
    ids = random_ids(2, 16)

    def run(scratch, stop_at=None):
        hessians = {}
        for visit in sequential_layers(StreamedModel.open(folder), ids, scratch=scratch):
            if visit.layer == stop_at:
                return hessians
            hessians |= visit.hessians
            for site in visit.sites:
                visit.replace(site, visit.weight(site) * 0.9)
        return hessians

    whole = run(tmp_path / "a")
    first = run(tmp_path / "b", stop_at=2)
    rest = run(tmp_path / "b")
    assert first and rest and not set(first) & set(rest)
    assert all(torch.equal(whole[k], v) for k, v in (first | rest).items())
