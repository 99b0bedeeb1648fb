"""A packed folder round-trips, resumes after any kill, reserves its disk, and notices every edit."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from haversack.errors import OutputError, PlanError
from haversack.formats import safetensors_file
from haversack.formats.packed_folder import (
    PackedFolder,
    PackedFolderWriter,
    PackedSite,
    is_packed,
    packed_disk_bytes,
    packed_files,
    unfinished_plan,
)
from haversack.formats.tiers import read_resident
from haversack.ledger import StoredTensor

PLAN = '{"plan": 1}\n'
SITES = {
    f"model.layers.{i}.mlp#{part}": PackedSite(
        {"grid": {"part": "integer", "bits": 4}},
        (StoredTensor("codes", "U8", (16, 32)), StoredTensor("scales", "F16", (16, 3))),
    )
    for i in range(2)
    for part in ("gate", "up")
}
REST = [StoredTensor("model.norm.weight", "BF16", (33,)), StoredTensor("lm_head.weight", "F32", (4, 4))]


def site_tensors(index: int) -> dict[str, torch.Tensor]:
    return {
        "codes": torch.full((16, 32), index, dtype=torch.uint8),
        "scales": torch.full((16, 3), index, dtype=torch.float16),
    }


def rest_tensor(tensor: StoredTensor) -> torch.Tensor:
    return torch.full(tensor.shape, 0.5, dtype={"BF16": torch.bfloat16, "F32": torch.float32}[tensor.dtype])


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE", "modeling_evil.py"):
        (folder / name).write_text(name)
    (folder / "additional_chat_templates/tool.jinja").write_text("tool")
    (folder / "model.safetensors").write_text("weights, not to be copied")
    return folder


def open_writer(source: Path, output: Path, plan: str = PLAN, **changes) -> PackedFolderWriter:
    arguments = {"sites": SITES, "rest": REST, "layouts": {"rows-v1": 1}, "max_shard_bytes": 1500} | changes
    return PackedFolderWriter(output, source, plan_text=plan, **arguments)


def fill(writer: PackedFolderWriter) -> None:
    for site_id in writer.missing_sites:
        writer.write_site(site_id, site_tensors(list(SITES).index(site_id)))
    for tensor in REST:
        if tensor.name in writer.missing_rest:
            writer.write_rest(tensor.name, rest_tensor(tensor))


@pytest.fixture
def packed(source, tmp_path):
    with open_writer(source, tmp_path / "packed") as writer:
        fill(writer)
        return writer.finish().path


def test_a_packed_folder_round_trips(source, packed):
    folder = PackedFolder.open(packed)
    assert is_packed(packed) and not is_packed(source) and not is_packed(packed / "no")
    assert sorted(path.name for path in packed.iterdir()) == [
        "LICENSE", "additional_chat_templates", "config.json", "generation_config.json", "haversack.json",
        "model.safetensors", "packed-00001-of-00002.safetensors", "packed-00002-of-00002.safetensors", "plan.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert not list(packed.parent.glob("*.partial*"))
    config = json.loads((packed / "config.json").read_text())
    assert config["hidden_size"] == 8 and config["quantization_config"]["quant_method"] == "haversack"
    assert folder.plan_text == PLAN and folder.manifest.layouts == {"rows-v1": 1}
    for index, (site_id, site) in enumerate(SITES.items()):
        assert folder.manifest.sites[site_id].option == dict(site.option)
        spans = folder.site_tensors(site_id)
        read = read_resident(spans.values())
        for name, tensor in site_tensors(index).items():
            assert read[f"{site_id}.{name}"].equal(tensor)
    assert load_file(packed / "model.safetensors")["lm_head.weight"].equal(rest_tensor(REST[1]))
    assert {name: tensor.stored for name, tensor in folder.rest_tensors().items()} == {t.name: t for t in REST}
    files = packed_files(SITES, REST, 1500)
    assert packed_disk_bytes(files) == sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    hashed = []
    assert folder.verify(hashed.append) == sum(hashed) == sum(t.num_bytes for ts in files.values() for t in ts)
    folder.require_layouts({"rows-v1": 1, "other": 2})
    with pytest.raises(PlanError, match="'rows-v1' version 1, but this haversack reads rows-v1 version 2"):
        folder.require_layouts({"rows-v1": 2})


def test_nothing_packed_and_nothing_left_over_are_folders_too(source, tmp_path):
    for sites, rest in (({}, REST), (SITES, [])):
        with open_writer(source, tmp_path / f"out{len(sites)}", sites=sites, rest=rest) as writer:
            for site_id in writer.missing_sites:
                writer.write_site(site_id, site_tensors(0))
            for tensor in rest:
                writer.copy_rest(tensor.name, [bytes(tensor.num_bytes)])
            assert len(writer.finish().tensors) == 2 * len(sites) + len(rest)


def edit_json(path: Path, edit) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def forge(folder: Path, edit) -> None:
    """Edit the manifest and give config.json the right hash for it, as a careful hand would."""
    edit_json(folder / "haversack.json", edit)
    sha256 = safetensors_file.hashlib.sha256((folder / "haversack.json").read_bytes()).hexdigest()
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(manifest_sha256=sha256))


SITE = "model.layers.0.mlp#gate"
FORGED = [
    (lambda m: m.pop("layouts"), r"layouts: Field required"),
    (lambda m: m.update(extra=1), r"extra: Extra inputs"),
    (lambda m: m.update(format_version=2), r"format version 2"),
    (lambda m: m.update(format_version="1"), r"format_version: Input should be a valid integer"),
    (lambda m: m.update(plan_sha256="x"), r"plan_sha256: String should match"),
    (lambda m: m.update(plan_sha256="0" * 64), r"plan\.json differs from the plan"),
    (lambda m: m["files"].update({"../evil": {"num_bytes": 10, "header_sha256": "0" * 64}}), r"evil is missing"),
    (lambda m: m["sites"].pop(SITE), r"disagree on tensors, first 'model\.layers\.0\.mlp#gate\.codes'"),
    (lambda m: m["sites"][SITE]["tensors"]["codes"].update(shape=[32, 16]), r"manifest says U8 \[32, 16\]"),
    (lambda m: m["sites"][SITE]["tensors"]["codes"].update(file="model.safetensors"), r"in model\.safetensors"),
]


@pytest.mark.parametrize(("edit", "complaint"), FORGED)
def test_a_forged_manifest_is_refused(packed, edit, complaint):
    forge(packed, edit)
    with pytest.raises(PlanError, match=complaint) as error:
        PackedFolder.open(packed)
    assert "\n" not in str(error.value)


def test_edits_by_hand_are_noticed(packed):
    for name in ("haversack.json", "plan.json"):
        kept = (packed / name).read_bytes()
        (packed / name).write_bytes(kept + b" ")
        with pytest.raises(PlanError, match="differs from the"):
            PackedFolder.open(packed)
        (packed / name).write_bytes(kept)
    shard = packed / "packed-00001-of-00002.safetensors"
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-1])
    with pytest.raises(PlanError, match=f"has {len(kept) - 1} bytes, but {len(kept)} were packed"):
        PackedFolder.open(packed)
    shard.write_bytes(kept.replace(b'"U8"', b'"I8"', 1))
    with pytest.raises(PlanError, match="another header"):
        PackedFolder.open(packed)
    shard.write_bytes(bytes([255]) * 16 + kept[16:])
    with pytest.raises(PlanError, match="another header"):
        PackedFolder.open(packed)
    shard.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    folder = PackedFolder.open(packed)  # the cheap check reads headers only
    with pytest.raises(PlanError, match=r"1 of 10 tensors in .* differ from what was packed, first model\.layers"):
        folder.verify()
    shard.unlink()
    with pytest.raises(PlanError, match="is missing"):
        PackedFolder.open(packed)


@pytest.mark.parametrize("name", ["config.json", "haversack.json", "plan.json"])
def test_a_missing_or_garbled_file_is_refused(packed, name):
    (packed / name).write_text("{")
    with pytest.raises(PlanError):
        PackedFolder.open(packed)
    (packed / name).unlink()
    with pytest.raises(PlanError, match="can't be read"):
        PackedFolder.open(packed)


def test_a_folder_that_is_not_packed_is_refused(source):
    with pytest.raises(PlanError, match="not a packed model"):
        PackedFolder.open(source)


def test_existing_output_is_never_touched(source, packed):
    before = {path: path.stat().st_mtime_ns for path in packed.iterdir()}
    with pytest.raises(OutputError, match="exists already"):
        open_writer(source, packed)
    assert {path: path.stat().st_mtime_ns for path in packed.iterdir()} == before


def test_an_interrupted_pack_resumes_with_its_own_plan_only(source, tmp_path):
    output = tmp_path / "out"
    assert unfinished_plan(output) is None
    with open_writer(source, output) as writer:
        first, second, *_ = SITES
        writer.write_site(first, site_tensors(0))
        with pytest.raises(OutputError, match="another process"):
            open_writer(source, output)
    assert unfinished_plan(output) == PLAN
    with pytest.raises(OutputError, match="another plan"):
        open_writer(source, output, plan="{}")
    with open_writer(source, output) as writer:
        assert writer.missing_sites[0] == second and first not in writer.missing_sites
        assert set(writer.missing_rest) == {tensor.name for tensor in REST}
        fill(writer)
        assert writer.missing_sites == writer.missing_rest == ()
        writer.finish().verify()


def test_a_stop_before_the_renaming_only_needs_the_renaming(source, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with open_writer(source, output) as writer, monkeypatch.context() as patched:
        fill(writer)
        patched.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            writer.finish()
    with open_writer(source, output) as writer:
        assert writer.missing_sites == writer.missing_rest == ()
        writer.finish().verify()


def test_a_wrong_set_of_tensors_is_refused(source, tmp_path):
    with open_writer(source, tmp_path / "out") as writer, pytest.raises(ValueError, match="but declared"):
        writer.write_site(SITE, {"codes": site_tensors(0)["codes"]})


def test_a_full_disk_leaves_nothing_behind(source, tmp_path, monkeypatch):
    real, calls = os.posix_fallocate, []

    def fills_up(fd, offset, num_bytes):
        calls.append(num_bytes)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, offset, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", fills_up)
    with pytest.raises(OutputError, match="free some space"):
        open_writer(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_read_only_output_is_explained(source, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere, so the refusal is played
    with pytest.raises(OutputError, match="read-only"):
        open_writer(source, tmp_path / "out")


KILLED = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from haversack.formats.packed_folder import PackedFolderWriter, PackedSite
from haversack.ledger import StoredTensor
sites = {{f"s{{i}}": PackedSite({{}}, (StoredTensor("codes", "U8", (20000,)),)) for i in range(60)}}
rest = [StoredTensor(f"r{{i}}", "U8", (20000,)) for i in range(20)]
print("ready", flush=True)
with PackedFolderWriter({output!r}, {source!r}, plan_text="{{}}", sites=sites, rest=rest, layouts={{}},
                        max_shard_bytes=300_000) as writer:
    for site_id in writer.missing_sites:
        file = writer._writer_of[site_id + ".codes"]
        writer._writers[file].write_pieces(site_id + ".codes", [bytes([int(site_id[1:])]) * 20000])
    for name in writer.missing_rest:
        writer.copy_rest(name, [bytes([100 + int(name[1:])]) * 20000])
    writer.finish()
"""


def test_killed_anywhere_it_resumes_to_the_same_bytes(source, tmp_path):
    rng = random.Random(1)
    outputs = []
    for kills in (0, 6):
        output = tmp_path / f"out{kills}"
        script = KILLED.format(path=sys.path, output=str(output), source=str(source))
        for _ in range(kills):
            process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
            process.communicate()
        if not output.exists():
            subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
        PackedFolder.open(output).verify()
        outputs.append({path.name: path.read_bytes() for path in output.iterdir() if path.is_file()})
        shutil.rmtree(output)
    assert outputs[0] == outputs[1]
