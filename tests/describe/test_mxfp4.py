"""MXFP4 checkpoints: blocks and scales read as the 16-bit tensors that they stand for, as transformers does it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.tiny import save_tiny

from haversack.describe.assemble import read_parameter, read_site
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.model import describe_model


def save_mxfp4(folder: Path, seed: int = 0) -> Path:
    """A tiny gpt-oss whose experts are stored in blocks and scales, as in the published checkpoints."""
    save_tiny("gpt_oss", folder, dtype="bfloat16")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, num_columns, num_rows = tensors.pop(name).shape
        shape = (num_experts, num_rows, num_columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(117, 124, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mxfp4(tmp_path_factory.mktemp("mxfp4") / "tiny-oss")


def test_stacks_equal_what_transformers_makes_of_them(folder: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model, checkpoint = describe_model(folder), Checkpoint.open(folder)
    stored = load_file(folder / "model.safetensors")
    for name in ("gate_up_proj", "down_proj"):
        path = "model.layers.1.mlp.experts"
        expected = convert_moe_packed_tensors(stored[f"{path}.{name}_blocks"], stored[f"{path}.{name}_scales"])
        found = read_parameter(checkpoint, model, path, name)
        assert found.dtype == torch.bfloat16 and found.unique().numel() > 15
        assert torch.equal(found, expected)


def test_sites_are_cut_from_blocks_and_every_number_is_named(folder: Path) -> None:
    model, checkpoint = describe_model(folder), Checkpoint.open(folder)
    stack = read_parameter(checkpoint, model, "model.layers.0.mlp.experts", "gate_up_proj")
    for site in model.weights:
        if site.expert is None or site.layer or site.role == "down":
            continue
        first = 0 if site.role == "gate" else 1
        assert torch.equal(read_site(checkpoint, site), stack[site.expert, :, first::2].T)
    assert not model.unused
    assert checkpoint.num_bytes == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())


def test_a_scale_beyond_bfloat16_is_refused_where_it_is_read(folder: Path, tmp_path: Path) -> None:
    from haversack.describe.checkpoint import require_finite
    from haversack.errors import CheckpointError

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj_scales"][0, 0, 0] = 255  # the format's not-a-number
    tensors["model.layers.0.mlp.experts.down_proj_blocks"][0, 0, 0] = 0x77
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    model, checkpoint = describe_model(tmp_path), Checkpoint.open(tmp_path)
    site = model.site("model.layers.0.mlp.experts#0.down")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        require_finite(read_site(checkpoint, site), site.id)
