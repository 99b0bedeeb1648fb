"""Packed folders written for other tools: the same values where the layout can say them, and named where it can't."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.engine.tiny import tiny_config

from haversack.cost.as_stored import stored_options
from haversack.cost.damage import NONE
from haversack.describe.assemble import read_site
from haversack.describe.checkpoint import Checkpoint
from haversack.describe.gguf_file import GgufFile
from haversack.describe.machine import Machine
from haversack.describe.model import Model, describe_model
from haversack.describe.site import WeightSite
from haversack.describe.workload import ServeWorkload
from haversack.engine.load import open_packed
from haversack.errors import OutputError, PlanError, UnsupportedModelError, UsageError
from haversack.formats.export import Packed
from haversack.jobs.export import export, open_for_export
from haversack.jobs.pack import pack
from haversack.parts.kv.base import KVOption
from haversack.parts.weights.base import WeightOption
from haversack.parts.weights.codebook import CodebookGrid
from haversack.parts.weights.hadamard import HadamardRotation
from haversack.parts.weights.integer import IntegerGrid
from haversack.parts.weights.nearest import NearestRounding
from haversack.plan.make import make_plan
from haversack.plan.question import Question
from haversack.plan.schema import Plan

NEAREST = NearestRounding()


def nearest(grid, **more) -> WeightOption:
    return WeightOption(grid=grid, rounding=NEAREST, **more)


AS_IS = WeightOption()
SAID = {
    "query": nearest(IntegerGrid(4, 64)),
    "key": nearest(IntegerGrid(3, 64, symmetric=False)),
    "value": nearest(IntegerGrid(8, 0)),
    "output": nearest(IntegerGrid(2, 64)),
    "gate": nearest(IntegerGrid(4, 64, symmetric=False)),
    "up": nearest(CodebookGrid("int3", 32)),
    "down": AS_IS,
    "head": nearest(IntegerGrid(8, 64)),
}
"""By role: options that both formats say without changing a value."""


def packed_folder(folder: Path, family: str, choose: Callable[[WeightSite], WeightOption]) -> tuple[Model, Path]:
    """A tiny model packed by nearest rounding, every site as `choose` says."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(family)
    config.intermediate_size, config.vocab_size = 192, 96
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape) / 8)
    model.save_pretrained(folder / "model")
    described = describe_model(folder / "model")
    pack(described, planned(described, choose), folder / "packed")
    return described, folder / "packed"


def planned(model: Model, choose: Callable[[WeightSite], WeightOption]) -> Plan:
    question = Question(
        model=model,
        workload=ServeWorkload(24, 9),
        machine=Machine("test", 2, 2**33, 2**33),
        budget_bytes=2**33,
        budget_kind="tensor",
        weight_damages={site.id: {choose(site): NONE} for site in model.weights},
        kv_damages={site.id: {KVOption(): NONE} for site in model.attention},
    )
    return make_plan(question).require_fit()


def matrices(packed: Path) -> dict[str, torch.Tensor]:
    opened = open_for_export(packed)
    return {site.id: opened.matrix(site) for site in opened.model.weights}


def by_role(site: WeightSite) -> WeightOption:
    return SAID.get(site.role, AS_IS)


def test_compressed_tensors_hold_the_same_codes(tmp_path: Path) -> None:
    model, packed = packed_folder(tmp_path, "llama", by_role)
    done = export(packed, tmp_path / "out", "compressed-tensors")
    assert {(c.site.rpartition(".")[2], c.now) for c in done.changes} == {
        ("k_proj", "the same values in 4 bits"),
        ("gate_proj", "the same values in 5 bits"),
    }
    assert done.notes == ()
    assert not (tmp_path / "out.partial").exists() and not list((tmp_path / "out").glob("*.journal"))
    again, checkpoint, stored = describe_model(tmp_path / "out"), Checkpoint.open(tmp_path / "out"), matrices(packed)
    for site in again.weights:
        expected = stored[site.id].to(torch.bfloat16)  # what the config's dtype keeps of the same values
        assert torch.equal(read_site(checkpoint, site), expected), site.id
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = [name for group in config["config_groups"].values() for name in group["targets"]]
    assert sorted([*targets, *config["ignore"]]) == sorted(s.id for s in model.weights if s.role != "embedding")


def test_compressed_tensors_load_in_plain_transformers(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install 'haversack[dev]'")
    from transformers import AutoModelForCausalLM

    _, packed = packed_folder(tmp_path, "llama", by_role)
    export(packed, tmp_path / "out", "compressed-tensors")
    ids = torch.randint(90, (2, 20), generator=torch.Generator().manual_seed(0))
    stored = matrices(packed)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        for name, matrix in stored.items():
            dense.get_submodule(name).weight.copy_(matrix)
        want, got = dense(ids).logits, loaded(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("form", ["compressed-tensors", "gguf"])
def test_what_a_format_cannot_say_is_named_and_keeps_its_values_nearly(form: str, bits: int, tmp_path: Path) -> None:
    unsayable = {
        "query": nearest(CodebookGrid("nf4", 64)),
        "key": nearest(IntegerGrid(4, 64), transforms=(HadamardRotation(),)),
        "down": nearest(CodebookGrid("max3", 16, "u4")),
    }
    _, packed = packed_folder(tmp_path, "qwen3", lambda site: unsayable.get(site.role, AS_IS))
    done = export(packed, tmp_path / "out.gguf", form, otherwise_bits=bits)
    model = open_packed(packed).described
    assert {c.site for c in done.changes} == {s.id for s in model.weights if s.role in unsayable}
    assert all(("int8" in c.now or "Q8_0" in c.now) == (bits == 8) for c in done.changes)
    again = describe_model(tmp_path / "out.gguf")
    checkpoint, stored = Checkpoint.open(again.folder), matrices(packed)  # type: ignore[arg-type]
    for site in again.weights:
        found, want = read_site(checkpoint, site).float(), stored[site.id]
        assert float((found - want).norm() / want.norm()) < (0.02 if bits == 8 else 0.003)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf_holds_the_same_values(family: str, tmp_path: Path) -> None:
    model, packed = packed_folder(tmp_path, family, by_role)
    done = export(packed, tmp_path / "out.gguf", "gguf")
    assert all("the same values" in change.now for change in done.changes)
    again = describe_model(tmp_path / "out.gguf")
    checkpoint, stored = Checkpoint.open(again.folder), matrices(packed)  # type: ignore[arg-type]
    assert [site.id for site in again.weights] == [site.id for site in model.weights] and not again.unused
    for site in again.weights:
        kept = stored[site.id].half() if site.dtype == "F16" else stored[site.id]
        assert torch.equal(read_site(checkpoint, site).float(), kept.float()), site.id
    for name in ("hidden_size", "num_key_value_heads", "intermediate_size", "vocab_size", "head_dim"):
        assert again.config[name] == model.config.get(name, again.config[name]), name
    read = Checkpoint.open(tmp_path / "model")
    for tensor in model.rest:
        assert torch.equal(checkpoint.read(tensor.name), read.read(tensor.name).float())


def test_a_gguf_file_is_planned_with_its_own_bytes(tmp_path: Path) -> None:
    _, packed = packed_folder(tmp_path, "llama", by_role)
    export(packed, tmp_path / "out.gguf", "gguf")
    model = describe_model(tmp_path / "out.gguf")
    assert (
        model.name == "out"
        and model.dtype == "F16"
        and {"GGUF's Q4_0", "GGUF's Q5_0", "GGUF's Q8_0"} == set(model.quantized)
    )
    checkpoint = Checkpoint.open(model.folder)  # type: ignore[arg-type]
    assert checkpoint.num_bytes + checkpoint.header_bytes == (tmp_path / "out.gguf").stat().st_size
    moved = (tmp_path / "out.gguf").rename(tmp_path / "moved.gguf")
    with pytest.raises(Exception, match="not there any more"):
        Checkpoint.open(model.folder)  # type: ignore[arg-type]
    assert describe_model(moved).num_bytes == model.num_bytes


def test_blocks_of_a_gguf_file_are_kept_bit_for_bit(tmp_path: Path) -> None:
    """Also where llama.cpp has rows in pairs: packed as stored and exported again, the blocks are the same bytes."""
    _, packed = packed_folder(tmp_path, "llama", by_role)
    export(packed, tmp_path / "out.gguf", "gguf")
    model = describe_model(tmp_path / "out.gguf")
    options = stored_options(model)
    kept = {"query", "output", "up"} | {"key"}
    assert {site.role for site in model.weights if site.id in options} == kept  # those in Q4_0
    pack(model, planned(model, lambda site: options.get(site.id, AS_IS)), tmp_path / "again")
    done = export(tmp_path / "again", tmp_path / "again.gguf", "gguf")
    assert {change.now.partition(" (")[0] for change in done.changes} == {"the same values in Q4_0"}
    first, second = GgufFile.open(tmp_path / "out.gguf"), GgufFile.open(tmp_path / "again.gguf")
    for name, tensor in first.tensors.items():
        if tensor.block.name == "Q4_0":
            other = second.tensors[name]
            assert (
                first.path.read_bytes()[tensor.start : tensor.stop]
                == second.path.read_bytes()[other.start : other.stop]
            )


def test_a_tokenizer_beside_a_gguf_file_is_taken_where_it_is_the_files_own(tmp_path: Path) -> None:
    _, packed = packed_folder(tmp_path, "llama", by_role)
    model = {"type": "BPE", "vocab": {chr(65 + i): i for i in range(20)}, "merges": []}
    text = json.dumps({"model": model, "pre_tokenizer": {"type": "ByteLevel", "use_regex": True}, "added_tokens": []})
    (packed / "tokenizer.json").write_text(text)
    assert export(packed, tmp_path / "own" / "m.gguf", "gguf").notes == ()
    (tmp_path / "own" / "tokenizer.json").write_text(text)
    home = describe_model(tmp_path / "own" / "m.gguf").folder
    assert home is not None and (home / "tokenizer.json").read_text() == text
    other = text.replace('"B": 1', '"B": 2').replace('"C": 2', '"C": 1')
    export(packed, tmp_path / "other" / "m.gguf", "gguf")
    (tmp_path / "other" / "tokenizer.json").write_text(other)
    home = describe_model(tmp_path / "other" / "m.gguf").folder
    assert home is not None and (
        not (home / "tokenizer.json").exists() or (home / "tokenizer.json").read_text() != other
    )


def test_rows_of_blocks_are_cut_where_heads_are(tmp_path: Path) -> None:
    _, packed = packed_folder(tmp_path, "llama", by_role)
    export(packed, tmp_path / "out.gguf", "gguf")
    model = describe_model(tmp_path / "out.gguf")
    checkpoint = Checkpoint.open(model.folder)  # type: ignore[arg-type]
    name = "model.layers.1.self_attn.q_proj.weight"
    whole = checkpoint.read(name)
    assert torch.equal(checkpoint.read_region(name, [(37, 100, 3), (5, 77, 2)]), whole[37:100:3, 5:77:2])


def test_outputs_and_folders_are_checked(tmp_path: Path) -> None:
    _, packed = packed_folder(tmp_path, "llama", by_role)
    with pytest.raises(PlanError, match="is not packed; run"):
        export(tmp_path / "model", tmp_path / "out", "gguf")
    with pytest.raises(UsageError, match="'onnx' is not one of"):
        export(packed, tmp_path / "out", "onnx")
    with pytest.raises(UsageError, match="4 is not one of 8 and 16"):
        export(packed, tmp_path / "out", "gguf", otherwise_bits=4)
    for form in ("gguf", "compressed-tensors"):
        with pytest.raises(OutputError, match="exists already"):
            export(packed, packed / "config.json", form)


@pytest.mark.parametrize("form", ["gguf", "compressed-tensors"])
def test_a_failure_leaves_nothing_behind(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, packed = packed_folder(tmp_path, "llama", by_role)
    before = sorted(tmp_path.rglob("*"))

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Packed, "tensors", fail)
    with pytest.raises(KeyboardInterrupt):
        export(packed, tmp_path / "out", form)
    assert sorted(tmp_path.rglob("*")) == before


def test_families_that_gguf_is_not_written_for_are_refused(tmp_path: Path) -> None:
    _, packed = packed_folder(tmp_path, "gemma2", lambda site: AS_IS)
    with pytest.raises(UnsupportedModelError, match="'gemma2' model, but llama, qwen2, qwen3"):
        export(packed, tmp_path / "out", "gguf")
    assert not (tmp_path / "out.partial").exists()
    assert export(packed, tmp_path / "out", "compressed-tensors").changes == ()
