"""Checkpoints that other tools quantized: seen as the 16-bit matrices that they stand for, and their codes kept bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.describe.quantized_folders import (
    awq,
    bytes_of_integers,
    gptq,
    packed_integers,
    save_quantized,
)

from haversack.describe.assemble import read_codes, read_site, stored_grid
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.model import describe_model
from haversack.describe.stored_form import StoredGrid
from haversack.describe.words import pack_words, unpack_words
from haversack.errors import CheckpointError, UnsupportedModelError

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
WHOLE_ROW = 1 << 30

LAYOUTS = {
    "gptq 4": (gptq, GPTQ, {}, StoredGrid(4, 64, True)),
    "gptq 3": (gptq, {**GPTQ, "bits": 3}, {"bits": 3, "symmetric": False}, StoredGrid(3, 64, False)),
    "gptq 8": (gptq, {**GPTQ, "bits": 8}, {"bits": 8}, StoredGrid(8, 64, True)),
    "gptq, activation order": (gptq, {**GPTQ, "desc_act": True}, {"mixed": True}, None),
    "gptq, groups of 32": (gptq, {**GPTQ, "group_size": 32}, {"group_size": 32}, StoredGrid(4, 32, True)),
    "gptq, zero points in groups of 32": (
        gptq,
        {**GPTQ, "group_size": 32},
        {"group_size": 32, "symmetric": False},
        None,
    ),
    "awq": (awq, AWQ, {"symmetric": False}, StoredGrid(4, 64, False)),
    "packed 3": (packed_integers, PACKED, {"bits": 3, "symmetric": False}, StoredGrid(3, 64, False)),
    "packed 5": (packed_integers, PACKED, {"bits": 5}, None),
    "bytes": (
        bytes_of_integers,
        {**PACKED, "format": "int-quantized"},
        {"bits": 8, "group_size": WHOLE_ROW},
        StoredGrid(8, 0, True),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrices_are_what_codes_scales_and_zero_points_make(layout: str, tmp_path: Path) -> None:
    pack, quantization, settings, grid = LAYOUTS[layout]
    matrices = save_quantized(tmp_path / "m", pack, quantization, **settings)
    model, checkpoint = describe_model(tmp_path / "m"), Checkpoint.open(tmp_path / "m")
    seen = 0
    for site in model.weights:
        expected = matrices.get(f"{site.module}.{site.parameter}")
        if expected is None:
            continue
        seen += 1
        found = read_site(checkpoint, site)
        assert found.dtype == torch.float16
        assert torch.equal(found, expected.weight.float().half())
        rows = checkpoint.read_region(site.pieces[0].tensor, [(3, 20, 2), (5, site.in_features, 7)])
        assert torch.equal(rows, found[3:20:2, 5::7])
        codes = read_codes(checkpoint, site)
        assert codes is not None and torch.equal(codes.codes.long(), expected.codes)
        if site.in_features == 192:  # of 128 columns, a row is a group of 128
            assert stored_grid(checkpoint, site) == grid == codes.grid()
    assert seen == 7 * model.num_layers
    assert not model.unused
    assert checkpoint.num_bytes == sum(t.nbytes for t in load_file(tmp_path / "m" / "model.safetensors").values())
    assert sum(model.quantized.values()) < checkpoint.num_bytes < model.num_bytes


def test_floats_of_eight_bits_are_scaled_by_row_or_as_a_whole(tmp_path: Path) -> None:
    values: dict[str, torch.Tensor] = {}

    def pack(matrix, bits: int) -> dict[str, torch.Tensor]:
        scale = matrix.scales[:, :1].float() if len(values) % 2 else matrix.scales[:1, 0].float()
        weight = ((matrix.codes - 128) / 2).to(torch.float8_e4m3fn)
        values[str(len(values))] = (weight.float() * scale).half()
        return {"weight": weight, "weight_scale": scale}

    matrices = save_quantized(tmp_path / "m", pack, {**PACKED, "format": "float-quantized"}, bits=8)
    model, checkpoint = describe_model(tmp_path / "m"), Checkpoint.open(tmp_path / "m")
    for name, expected in zip(matrices, values.values(), strict=True):
        site = next(site for site in model.weights if f"{site.module}.{site.parameter}" == name)
        assert torch.equal(read_site(checkpoint, site), expected)
        assert read_codes(checkpoint, site) is None and stored_grid(checkpoint, site) is None


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_hold_codes_of_any_width(bits: int) -> None:
    codes = torch.randint(1 << bits, (3, 77), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert words.shape == (3, -(-77 * bits // 32))
    assert torch.equal(unpack_words(words, bits, 77), codes)
    for at in (0, 31, 32, 76):  # bit by bit, as the layout is defined
        stream = sum(int(word) % 2**32 << 32 * i for i, word in enumerate(words[1]))
        assert stream >> at * bits & (1 << bits) - 1 == codes[1, at]


def test_codes_are_planned_and_packed_as_stored_without_loss(tmp_path: Path) -> None:
    from haversack.describe.machine import named
    from haversack.describe.workload import ServeWorkload
    from haversack.engine.load import open_packed
    from haversack.jobs.pack import pack
    from haversack.parts.weights.base import WeightOption
    from haversack.plan.make import make_plan
    from haversack.plan.question import Question

    matrices = save_quantized(tmp_path / "m", awq, AWQ, symmetric=False)
    model = describe_model(tmp_path / "m")
    question = Question(model, ServeWorkload(8, 4), named("epyc-9654-384gb"), 2**30, "tensor", lossless=True)
    answer = make_plan(question)
    assert answer.fits and answer.plan.prediction.damage.nats == 0
    kept = [row for row in answer.plan.weights if WeightOption.from_dict(row.option).keeps_codes]
    assert len(kept) == len(matrices)
    assert any("AWQ's 4-bit integers" in note for note in answer.plan.notes)
    pack(model, answer.plan, tmp_path / "packed")
    packed = open_packed(tmp_path / "packed")
    for row in kept:
        site = model.site(row.site)
        option = WeightOption.from_dict(row.option)
        stored = {name: packed.folder.site_tensors(site.id)[name] for name in ("codes", "scales", "zeros")}
        tensors = {name: Checkpoint.open(t.file).read(t.name) for name, t in stored.items()}
        dense = option.dense(tensors, site.out_features, site.in_features)
        assert torch.equal(dense, matrices[f"{site.module}.{site.parameter}"].weight.float())


def test_whole_models_and_streamed_layers_compute_with_the_same_matrices(tmp_path: Path) -> None:
    """By transformers without any package for GPTQ: its own code, and matrices that are read here."""
    from transformers import AutoModelForCausalLM

    from haversack.describe.hub import read_config
    from haversack.engine.whole import load_whole

    matrices = save_quantized(tmp_path / "m", gptq, GPTQ, mixed=True)
    tensors = {k: v for k, v in load_file(tmp_path / "m" / "model.safetensors").items() if "_proj" not in k}
    config = read_config(tmp_path / "m" / "config.json")
    del config["quantization_config"]
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    dense = {name: m.weight.float().half() for name, m in matrices.items()}
    save_file({**tensors, **dense}, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(70, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = load_whole(describe_model(tmp_path / "m"), dtype=torch.float32, attention="eager")(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", dtype=torch.float32, attn_implementation="eager"
        )
        assert torch.equal(found, plain(ids).logits)


def _broken(change: Callable[[dict], None], tmp_path: Path, pack=gptq, quantization: dict = GPTQ) -> None:
    save_quantized(tmp_path / "m", pack, quantization)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    model, checkpoint = describe_model(tmp_path / "m"), Checkpoint.open(tmp_path / "m")
    for site in model.weights:
        read_site(checkpoint, site)


def test_tensors_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    base = "model.layers.1.mlp.up_proj"

    def cut(tensors: dict) -> None:
        tensors[f"{base}.scales"] = tensors[f"{base}.scales"][:, :-1].contiguous()

    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.*no layout of gptq"):
        _broken(cut, tmp_path)


def test_a_group_that_there_is_not_is_refused(tmp_path: Path) -> None:
    def far(tensors: dict) -> None:
        tensors["model.layers.1.mlp.up_proj.g_idx"][3] = 99

    with pytest.raises(CheckpointError, match="group 99, where groups go from 0 to 1"):
        _broken(far, tmp_path)


def test_a_shape_that_lies_is_refused(tmp_path: Path) -> None:
    def lie(tensors: dict) -> None:
        tensors["model.layers.0.mlp.up_proj.weight_shape"] = torch.tensor([2**40, 2**40])

    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj"):
        _broken(lie, tmp_path, packed_integers, PACKED)


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({**GPTQ, "checkpoint_format": "marlin"}, "'marlin'"),
        ({**GPTQ, "bits": "four"}, "'four' bits"),
        ({**AWQ, "version": "gemv"}, "'gemv'"),
        ({**PACKED, "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        ({**PACKED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({"quant_method": "bitsandbytes"}, "quantized already"),
    ],
)
def test_forms_that_are_not_read_are_refused_by_name(quantization: dict, said: str, tmp_path: Path) -> None:
    save_quantized(tmp_path / "m", gptq, GPTQ)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(UnsupportedModelError, match=said):
        describe_model(tmp_path / "m")
