"""Sites against transformers: what we assemble from the files is what `from_pretrained` loads, and no byte is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod

import pytest
import torch
from tests.describe.families import FAMILIES

from haversack.describe.assemble import read_parameter, read_site
from haversack.describe.checkpoint import Checkpoint, dtype_name
from haversack.describe.hub import find_source
from haversack.describe.model import Model, describe_model
from haversack.describe.site import ROLES, TensorSlice, WeightSite


def cut(parameter: torch.Tensor, piece: TensorSlice) -> torch.Tensor:
    """`TensorSlice` as its docstring defines it, written down a second time."""
    value = parameter[tuple(slice(start, stop) for start, stop in piece.index)]
    if piece.squeeze:
        value = value[0]
    if piece.transposed:
        value = value.T
    return value[:: piece.row_step]


def elements_of(piece: TensorSlice, shape: tuple[int, ...]) -> torch.Tensor:
    """The flat indices of a slice's numbers in its tensor."""
    return cut(torch.arange(prod(shape)).reshape(shape), piece).flatten()


def load(folder) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param


def test_sites_and_rest_reassemble_every_parameter(family, saved_families):
    folder = saved_families(family)
    model, checkpoint = describe_model(folder), Checkpoint.open(folder)
    loaded = load(folder).state_dict()
    rebuilt = {name: torch.full_like(value, float("nan")) for name, value in loaded.items()}
    for site in model.weights:
        matrix = read_site(checkpoint, site)
        assert matrix.shape == (site.out_features, site.in_features)
        assert matrix.is_contiguous() and dtype_name(matrix.dtype) == site.dtype
        for module in (site.module, *site.tied_modules):
            cut(rebuilt[f"{module}.{site.parameter}"], site.module_slice).copy_(matrix)
    for tensor in model.rest:
        module, _, parameter = tensor.name.rpartition(".")
        rebuilt[tensor.name].copy_(read_parameter(checkpoint, model, module, parameter))
    for name, value in loaded.items():
        assert torch.equal(rebuilt[name], value), name


def test_every_parameter_is_read_as_loaded(family, saved_families):
    folder = saved_families(family)
    model, checkpoint = describe_model(folder), Checkpoint.open(folder)
    for name, value in load(folder).state_dict().items():
        module, _, parameter = name.rpartition(".")
        read = read_parameter(checkpoint, model, module, parameter)
        assert torch.equal(read.to(value.dtype), value), name  # some buffers are loaded in float32 whatever is saved


def test_every_byte_of_the_files_has_one_owner(family, saved_families):
    folder = saved_families(family)
    model, checkpoint = describe_model(folder), Checkpoint.open(folder)
    owners = {name: torch.zeros(prod(t.shape), dtype=torch.int) for name, t in checkpoint.tensors.items()}
    for site in model.weights:
        for piece in site.pieces:
            owners[piece.tensor][elements_of(piece, checkpoint[piece.tensor].shape)] += 1
    for tensor in model.rest:
        for block in model.sources[tensor.name].blocks:
            assert prod(block.shape) == prod(checkpoint[block.tensor].shape)
            owners[block.tensor] += 1
    assert all((count == 1).all() for count in owners.values())
    file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert model.num_bytes + checkpoint.header_bytes == file_bytes
    loaded = {id(value): value for value in load(folder).state_dict(keep_vars=True).values()}
    assert model.num_parameters == sum(value.numel() for value in loaded.values())


def test_a_config_alone_gives_the_same_model(family, saved_families):
    folder = saved_families(family)
    from_folder, from_config = describe_model(folder), describe_model(folder / "config.json")
    assert from_config.folder is None
    assert replace(from_config, folder=folder, name=from_folder.name) == from_folder
    assert from_config.fingerprint == from_folder.fingerprint


def test_a_config_of_its_own_name_gives_it_to_the_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["llama"]))
    (tmp_path / "tiny-llama.json").write_text(json.dumps(FAMILIES["llama"]))
    assert find_source(tmp_path / "tiny-llama.json").name == "tiny-llama"
    assert find_source(tmp_path / "config.json").name == tmp_path.name


# Latent projections and Gemma 3n's extra paths have no role of their own; a vision tower is left as it is.
WITH_OTHERS = {"deepseek_v3", "gemma3n_text", "gemma3"}


def test_site_ids_are_unique_and_roles_known(family):
    model = describe_model(FAMILIES[family])
    ids = [site.id for site in model.weights]
    assert len(ids) == len(set(ids))
    assert all(site.role in ROLES for site in model.weights)
    if family not in WITH_OTHERS:
        assert "other" not in {site.role for site in model.weights}
        assert sum(site.num_bytes for site in model.weights) > 0.85 * model.num_bytes


def roles(model: Model, layer: int | None) -> list[str]:
    return [site.role for site in model.weights if site.layer == layer]


def test_llama_sites():
    model = describe_model(FAMILIES["llama"])
    assert roles(model, None) == ["embedding", "head"]
    assert roles(model, 1) == ["query", "key", "value", "output", "gate", "up", "down"]
    assert model.site("model.layers.1.mlp.down_proj") == WeightSite(
        id="model.layers.1.mlp.down_proj",
        role="down",
        layer=1,
        out_features=32,
        in_features=48,
        dtype="BF16",
        module="model.layers.1.mlp.down_proj",
        parameter="weight",
        pieces=(TensorSlice("model.layers.1.mlp.down_proj.weight"),),
        module_slice=TensorSlice("model.layers.1.mlp.down_proj.weight"),
    )
    assert (model.num_layers, model.hidden_size, model.vocab_size, model.max_positions) == (2, 32, 72, 64)
    assert (model.architecture, model.model_type, model.dtype) == ("LlamaForCausalLM", "llama", "BF16")
    assert {t.name for t in model.buffers} == {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"}
    assert not model.tie_word_embeddings


def test_a_tied_head_is_one_storage():
    model = describe_model(FAMILIES["qwen3"])
    assert model.tie_word_embeddings
    assert roles(model, None) == ["embedding"]
    assert model.site("model.embed_tokens").tied_modules == ("lm_head",)


def test_phi3_parts_are_row_blocks_in_order():
    model = describe_model(FAMILIES["phi3"])
    fused = "model.layers.0.self_attn.qkv_proj"
    slices = {part: model.site(f"{fused}#{part}").pieces for part in ("query", "key", "value")}
    assert slices == {
        "query": (TensorSlice(f"{fused}.weight", ((0, 32),)),),
        "key": (TensorSlice(f"{fused}.weight", ((32, 48),)),),
        "value": (TensorSlice(f"{fused}.weight", ((48, 64),)),),
    }
    up = model.site("model.layers.0.mlp.gate_up_proj#up")
    assert (up.role, up.pieces[0].index) == ("up", ((48, 96),))


def test_gpt2_parts_are_columns_of_a_transposed_tensor():
    model = describe_model(FAMILIES["gpt2"])
    key = model.site("transformer.h.1.attn.c_attn#key")
    assert key.pieces == (TensorSlice("transformer.h.1.attn.c_attn.weight", ((0, 32), (32, 64)), transposed=True),)
    assert key.bias and (key.out_features, key.in_features) == (32, 32)
    assert model.site("transformer.wpe").role == "position"
    assert model.site("transformer.wte").tied_modules == ("lm_head",)
    assert model.site("transformer.h.0.mlp.c_fc").role == "up"


def test_mixtral_experts_come_from_tensors_of_their_own():
    model = describe_model(FAMILIES["mixtral"])
    up = model.site("model.layers.1.mlp.experts#2.up")
    assert (up.expert, up.role, up.layer) == (2, "up", 1)
    assert up.pieces == (TensorSlice("model.layers.1.block_sparse_moe.experts.2.w3.weight"),)
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    assert up.module_slice == TensorSlice(stack, ((2, 3), (48, 96)), squeeze=True)
    assert any(tensor.name == "model.layers.1.mlp.gate.weight" for tensor in model.rest)


def test_gpt_oss_experts_are_stacked_transposed_and_interleaved():
    model = describe_model(FAMILIES["gpt_oss"])
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    cut = ((1, 2), (0, 32), (1, 96))
    expected = TensorSlice(stack, cut, squeeze=True, transposed=True, row_step=2)
    up = model.site("model.layers.0.mlp.experts#1.up")
    assert up.pieces == (expected,) and up.module_slice == expected
    assert up.bias and (up.out_features, up.in_features) == (48, 32)


def test_only_the_text_decoder_of_a_multimodal_model_is_packed():
    model = describe_model(FAMILIES["gemma3"])
    assert all("language_model" in site.module for site in model.weights)
    assert any("vision_tower" in tensor.name for tensor in model.rest)
    assert len(model.attention) == model.num_layers == 2


def test_a_fingerprint_is_of_the_model_and_not_of_its_name():
    first = describe_model(FAMILIES["llama"])
    assert describe_model({**FAMILIES["llama"], "_name_or_path": "elsewhere"}).fingerprint == first.fingerprint
    assert describe_model({**FAMILIES["llama"], "rms_norm_eps": 1e-4}).fingerprint != first.fingerprint
