"""Sites against transformers: what we assemble from the files is what `from_pretrained` loads, and no byte is lost."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from tests.describe.families import FAMILIES

from haversack.describe.assemble import read_parameter, read_site
from haversack.describe.checkpoint import Checkpoint, dtype_name
from haversack.describe.model import Model, describe_model
from haversack.describe.site import TensorSlice, WeightSite


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
        assert read.dtype == value.dtype and torch.equal(read, value), name


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
    assert model.num_parameters == sum(p.numel() for p in load(folder).parameters())


def test_a_config_alone_gives_the_same_model(family, saved_families):
    folder = saved_families(family)
    from_folder, from_config = describe_model(folder), describe_model(folder / "config.json")
    assert from_config.folder is None
    assert replace(from_config, folder=folder, name=from_folder.name) == from_folder
    assert from_config.fingerprint == from_folder.fingerprint


def test_site_ids_are_unique_and_roles_known(family):
    model = describe_model(FAMILIES[family])
    ids = [site.id for site in model.weights]
    assert len(ids) == len(set(ids))
    assert "other" not in {site.role for site in model.weights}
    assert sum(site.num_bytes for site in model.weights) > 0.85 * model.num_bytes


def roles(model: Model, layer: int | None) -> list[str]:
    return [site.role for site in model.weights if site.layer == layer]


def site_of(model: Model, site_id: str) -> WeightSite:
    return model.site(site_id)


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
