"""Bad input: one clear sentence that names what was asked, what was found and the way out; never a traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.describe.families import FAMILIES

from haversack.describe.model import describe_model
from haversack.errors import CheckpointError, HaversackError, ModelNotFoundError, UnsupportedModelError, UsageError

LLAMA = FAMILIES["llama"]


def is_one_sentence(error: BaseException) -> bool:
    message = str(error)
    return message.endswith(".") and "\n" not in message and len(message) < 600


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path, saved_families) -> Path:
    return shutil.copytree(saved_families("llama-tied"), tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llama9"}, "model_type 'llama9'"),
        ({"model_type": None}, "no model_type"),
        ({"model_type": 5}, "model_type 5"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "xyz", "auto_map": {"AutoConfig": "configuration_xyz.XyzConfig"}}, "trust-remote-code"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized already .fp8."),
        ({"num_attention_heads": 5}, "no multiple of its 5 heads"),
        ({"num_key_value_heads": 3}, "4 heads can't share 3"),
        ({"num_key_value_heads": 0}, "4 heads can't share 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"hidden_size": 2**50}, "hidden_size is"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"hidden_act": "gulu"}, "gulu"),
        ({"layer_types": ["full_attention"] * 5}, "layer"),
        ({"rope_parameters": 7}, "config"),
    ],
)
def test_configs_that_cannot_be(change, says):
    with pytest.raises(UnsupportedModelError, match=says) as caught:
        describe_model({**LLAMA, **change})
    assert is_one_sentence(caught.value)


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.floats(),
    st.text(max_size=3),
    st.just([]),
    st.just({}),
    st.just(10**30),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(family=st.sampled_from(["llama", "gpt_oss", "gemma3_text", "gpt2"]), data=st.data())
def test_a_mutated_config_never_gives_a_traceback(family, data):
    config = dict(FAMILIES[family])
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=2)):
        config[key] = data.draw(_VALUES)
    try:
        describe_model(config)
    except HaversackError as error:
        assert "\n" not in str(error)


def test_missing_folders_configs_and_ids(tmp_path):
    for source, says in [
        (tmp_path / "nowhere", "no folder"),
        (str(tmp_path / "nowhere"), "no folder"),
        (tmp_path, "no config.json"),
        ("./nowhere", "no hub id"),
        ("nobody/nothing", "HF_HUB_OFFLINE forbids asking"),
        ("nothing@v1", "HF_HUB_OFFLINE forbids asking"),
    ]:
        with pytest.raises(ModelNotFoundError, match=says) as caught:
            describe_model(source)
        assert is_one_sentence(caught.value) and caught.value.exit_code == 2
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="adapter"):
        describe_model(tmp_path)
    (tmp_path / "weights.onnx").write_text("")
    with pytest.raises(ModelNotFoundError, match="is a file"):
        describe_model(tmp_path / "weights.onnx")
    with pytest.raises(UsageError, match="name one"):
        describe_model("owner/name@a", revision="b")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 50_000])
def test_a_config_that_is_no_json_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        describe_model(tmp_path)
    assert is_one_sentence(caught.value)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_parameter_is_named(folder):
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 of \d+ parameters .* 'model.layers.1.mlp.up_proj.weight'"):
        describe_model(folder)


def test_a_mis_shaped_parameter_is_named(folder):
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.zeros(31)}))
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' .* shape \[31\] .* asks for \[32\]"):
        describe_model(folder)


def test_a_foreign_checkpoint_is_refused(folder, saved_families):
    shutil.copy(saved_families("gpt2") / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="do not belong together"):
        describe_model(folder)


def test_a_tensor_nobody_reads_is_counted_apart(folder):
    before = describe_model(folder)
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.extra": torch.zeros(3)}))
    after = describe_model(folder)
    assert [(t.name, t.num_bytes) for t in after.unused] == [("model.layers.0.self_attn.extra", 12)]
    assert after.num_bytes == before.num_bytes and after.weights == before.weights


def test_a_head_saved_beside_its_tied_embedding(folder):
    before = describe_model(folder)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    same = describe_model(folder)
    assert same.weights == before.weights and [t.name for t in same.unused] == ["lm_head.weight"]
    # As transformers: two different tensors are not tied, whatever the config says.
    rewrite(folder, lambda t: t["lm_head.weight"].add_(1))
    different = describe_model(folder)
    assert not different.tie_word_embeddings and different.unused == ()
    assert [site.role for site in different.weights if site.layer is None] == ["embedding", "head"]
    # Only the head is there: the embedding is read from it.
    rewrite(folder, lambda t: t.pop("model.embed_tokens.weight"))
    head_only = describe_model(folder)
    assert head_only.site("model.embed_tokens").pieces[0].tensor == "lm_head.weight"
    assert head_only.num_bytes == before.num_bytes


def test_a_checkpoint_of_the_base_model_is_described(folder):
    """Names without `model.` in front, as GPT-2 and older repositories have them."""

    def strip(tensors: dict) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    before = describe_model(folder)
    rewrite(folder, strip)
    after = describe_model(folder)
    assert after.site("model.layers.0.mlp.up_proj").pieces[0].tensor == "layers.0.mlp.up_proj.weight"
    assert after.num_bytes == before.num_bytes and not after.unused


def test_importing_describe_loads_neither_torch_nor_transformers():
    code = (
        "import sys; import haversack.describe.model, haversack.describe.checkpoint, haversack.describe.assemble; "
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_70b_config_is_described_quickly_and_exactly():
    """Nearly all CPU time is importing torch and transformers (3 to 4 s on a busy 2-core EPYC); this is the rest."""
    config = {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "dtype": "bfloat16",
    }
    code = (
        "import json, sys, time; from haversack.describe.model import describe_model; "
        "config = json.loads(sys.argv[1]); m = describe_model(config); "
        "start = time.process_time(); describe_model(config); "
        "print(m.num_parameters, m.num_bytes, time.process_time() - start)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(config)], capture_output=True, text=True, check=True
    )
    num_parameters, num_bytes, seconds = result.stdout.split()
    layer = 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672) + 2 * 8192
    assert int(num_parameters) == 80 * layer + 2 * 128256 * 8192 + 8192 == 70_553_706_496
    assert int(num_bytes) == 2 * int(num_parameters)
    assert float(seconds) < 1.0


def test_a_hub_that_has_no_address_is_not_asked_again_and_again(monkeypatch, capfd):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr("haversack.describe.hub.getproxies", dict)
    begun = time.monotonic()
    with pytest.raises(ModelNotFoundError, match=r"hub\.invalid can't be reached"):
        describe_model("owner/name")
    assert time.monotonic() - begun < 10 and "Retry" not in capfd.readouterr().err


def test_a_hub_id_is_described_from_its_cached_snapshot(tmp_path, saved_families, monkeypatch):
    """The config comes first; a snapshot whose weights are all there is a folder, any other is config alone."""
    snapshot = tmp_path / "snapshots" / "0123abc"
    shutil.copytree(saved_families("llama-tied"), snapshot)
    asked = []

    def download(hub_id: str, file: str, revision: str | None = None, **ways: Any) -> str:
        asked.append((hub_id, file, revision))
        return str(snapshot / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    whole = describe_model("owner/name@main")
    assert asked == [("owner/name", "config.json", "main")]
    assert (whole.name, whole.hub_id, whole.revision, whole.folder) == ("owner/name", "owner/name", "0123abc", snapshot)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    config_only = describe_model("owner/name", revision="main")
    assert config_only.folder is None and config_only.weights == whole.weights
