"""Folders as people have them: in shards, of every float dtype, tied and untied, packed and run end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import WORKLOAD, pack_command, save_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

SHARD = "60KB"


def save_sharded(source: Path, folder: Path, dtype: torch.dtype, *, tied: bool) -> Path:
    config = AutoConfig.from_pretrained(source)
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder, max_shard_size=SHARD)
    save_tokenizer(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("dtype", "budget", "loop"),
    [
        (torch.float32, "260KiB", "compiled step"),
        (torch.bfloat16, "190KiB", "compiled step"),
        (torch.float16, "190KiB", "compiled step"),
    ],
)
def test_a_sharded_folder_packs_and_runs(cli, source, tmp_path, calibration_text, dtype, budget, loop, tied):
    from haversack.jobs.run import generate

    model = save_sharded(source, tmp_path / "model", dtype, tied=tied)
    ran = cli(*pack_command(model, tmp_path / "out", calibration_text, "--json", budget=budget))
    assert ran.code == 0 and ran.json["fits"], ran.err
    given = generate(tmp_path / "out", "line 3", max_new_tokens=4)
    assert given["new_tokens"] == 4 or given["finish"] == "end", given
    assert given["loop"] == loop and (given["loop_reason"] is None) == (loop == "compiled step")


def test_a_missing_shard_is_named(cli, source, tmp_path, calibration_text):
    model = save_sharded(source, tmp_path / "model", torch.bfloat16, tied=False)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    gone = sorted(set(index["weight_map"].values()))[1]
    (model / gone).unlink()
    cli(*pack_command(model, tmp_path / "out", calibration_text)).refuses(gone, code=1)
    assert not list(tmp_path.glob("out*"))


def test_a_disk_too_full_for_the_plan_leaves_nothing(cli, source, tmp_path, calibration_text, monkeypatch):
    import errno
    import os

    whole = Path.write_bytes

    def full(self, data):
        if self.parent.name == "out.partial.new":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    cli(*pack_command(source, tmp_path / "out", calibration_text, budget="1GiB")).refuses("free some space", code=1)
    assert not list(tmp_path.glob("out*"))


def test_a_plan_is_written_before_it_is_printed(cli, source, tmp_path, monkeypatch):
    """Whoever reads standard output may leave after the first line, as `head -1` does."""

    def gone(answer):
        raise BrokenPipeError

    monkeypatch.setattr("haversack.cli.plan.print_answer", gone)
    monkeypatch.setattr("haversack.cli.console.leave_closed_pipe", lambda: None)
    cli("plan", source, *WORKLOAD, "--tensor-budget", "1GiB", "-o", tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())


def test_an_output_that_training_would_not_write_is_refused(cli, source, tmp_path):
    cli("plan", source, "--task", "train", "--budget", "1GiB", "-o", tmp_path / "plan.json").refuses("--output")
