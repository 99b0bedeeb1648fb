"""A model run one layer at a time computes what the whole model computes, for every family, and frees what it held."""

import pytest
import torch
from tests.describe.families import FAMILIES
from tests.engine.tiny import load_whole, random_ids, save_tiny

from haversack.describe.model import describe_model
from haversack.describe.site import TensorSlice
from haversack.engine.layers import StreamedModel, matrix_view, site_rows
from haversack.errors import CheckpointError, UnsupportedModelError

REFUSED = {"gemma3n_text"}  # layers share keys and values, and read the tokens besides hidden states


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in REFUSED])
def test_layer_by_layer_is_the_whole_model_bit_for_bit(family, tmp_path):
    torch.set_num_threads(1)
    folder = save_tiny(family, tmp_path, dtype=FAMILIES[family].get("dtype", "float32"), num_layers=None)
    model = StreamedModel.open(folder)
    ids = random_ids(2, 40)
    with torch.no_grad():
        expected = load_whole(folder, model.compute_dtype, model.module.config._attn_implementation)(ids).logits
        with model.before_layers() as embed:
            hidden = embed(ids)
        for layer in range(model.num_layers):
            with model.layer(layer):
                hidden = model.run_layer(layer, hidden)
        with model.after_layers() as logits_of:
            logits = logits_of(hidden)
            part = logits_of(hidden[:1, 7:9])
    assert torch.equal(logits, expected)
    assert torch.allclose(part, expected[:1, 7:9], rtol=2e-2, atol=2e-2)  # another shape of product: other rounding
    assert all(parameter.device.type == "meta" for parameter in model.module.parameters())


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_layers_that_need_more_than_hidden_states_are_refused_by_name(family, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"Gemma3nForCausalLM.*one at a time"):
        StreamedModel.open(save_tiny(family, tmp_path, num_layers=None))


def test_layers_that_read_the_tokens_are_refused(tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = StreamedModel.open(save_tiny("llama", tmp_path))
    original = LlamaRotaryEmbedding.forward

    def forward(self, x, position_ids):
        cos, sin = original(self, x, position_ids)
        return cos + x.mean(), sin

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", forward)
    with pytest.raises(UnsupportedModelError, match="more than hidden states"), model.before_layers() as embed:
        embed(random_ids(1, 8))


def test_one_layer_is_held_at_a_time(tmp_path):
    model = StreamedModel.open(save_tiny("llama", tmp_path))
    with model.layer(1):
        held = {n for n, p in model.module.named_parameters() if p.device.type != "meta"}
    assert held and all(name.startswith("model.layers.1.") for name in held)


def test_sites_are_views_of_their_modules(tmp_path):
    for family in ("phi3", "gpt2", "gpt_oss"):
        folder = save_tiny(family, tmp_path / family)
        model = StreamedModel.open(folder)
        with model.layer(0):
            for site in model.layer_sites(0):
                parameter = model.module.get_parameter(f"{site.module}.{site.parameter}")
                view = matrix_view(parameter, site.module_slice)
                assert view.shape == (site.out_features, site.in_features)
                assert view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
                stack = parameter[site.expert] if site.expert is not None else parameter
                whole = stack.T if site.module_slice.transposed else stack
                assert torch.equal(whole[site_rows(site)], view)


def test_interleaved_rows_are_cut_with_their_step():
    parameter = torch.arange(24.0).view(2, 3, 4)  # (experts, in, out), gate and up interleaved along out
    view = matrix_view(parameter, TensorSlice("t", ((1, 2), (0, 3), (1, 4)), squeeze=True, transposed=True, row_step=2))
    assert torch.equal(view, parameter[1].T[1::2])


def test_a_config_alone_has_no_layers_to_run():
    with pytest.raises(CheckpointError, match="weights"):
        StreamedModel.open(describe_model(FAMILIES["llama"]))
