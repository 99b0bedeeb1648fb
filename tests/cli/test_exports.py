"""`haversack export`, and what it wrote as a starting point again."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize("form", ["gguf", "compressed-tensors"])
def test_an_exported_folder_is_told_of_and_planned_again(cli, packed, form: str, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    done = cli("export", packed, "--format", form, "-o", output, "--json")
    assert done.code == 0 and done.json["format"] == form and done.json["bytes"] > 0
    assert all({"site", "was", "now"} == set(change) for change in done.json["changes"])
    planned = cli("plan", output, "--tensor-budget", "1GiB", "--context", "24", "--json")
    assert planned.code == 0 and planned.json["fits"]


def test_changes_are_printed_by_site(cli, packed, tmp_path: Path) -> None:
    done = cli("export", packed, "--format", "gguf", "-o", tmp_path / "m.gguf", "--otherwise", "16")
    assert done.code == 0 and done.out.startswith(f"Wrote {tmp_path / 'm.gguf'}: ")
    changes = [line for line in done.out.splitlines() if line.startswith("  model.")]
    assert not changes or f"({len(changes)} places)" in done.out


def test_wrong_usage_and_taken_outputs_are_refused(cli, packed, tmp_path: Path) -> None:
    cli("export", packed, "--format", "onnx", "-o", tmp_path / "m").refuses("'onnx'", "compressed-tensors, gguf")
    cli("export", packed, "--format", "gguf", "-o", tmp_path / "m", "--otherwise", "4").refuses("4", "8 and 16")
    cli("export", tmp_path, "--format", "gguf", "-o", tmp_path / "m").refuses("config.json", code=1)
    cli("export", tmp_path / "none", "--format", "gguf", "-o", tmp_path / "m").refuses("there is no folder", code=1)
    cli("export", packed, "--format", "compressed-tensors", "-o", packed).refuses("exists already", code=1)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    cli("plan", tmp_path / "broken.gguf", "--budget", "1GiB").refuses("not a sound GGUF file", code=1)
